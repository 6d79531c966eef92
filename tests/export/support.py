"""Manifests that were edited by hand."""

import json

from export.manifest import FILE, digest_of_tree
from tarvis.files.outputs import digest_of_file


def edit_manifest(folder, digests=True, **changes):
    """Change a folder's manifest by hand; with `digests` its own and those of all files are made to fit."""
    path = folder / FILE
    tree = json.loads(path.read_text())
    tree.pop("digest")
    sealed = {"seal": tree.pop("seal")} if "seal" in tree else {}
    if digests:
        tree["files"] = {name: digest_of_file(folder / name) for name in tree["files"]}
    before = digest_of_tree(tree)
    tree |= changes
    path.write_text(json.dumps(tree | {"digest": digest_of_tree(tree) if digests else before} | sealed))
