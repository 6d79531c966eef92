"""Damage for files that readers must refuse: in one clear error, or read rightly."""

import copy
import json
import random
import time
import warnings
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tarvis.structures import LONGEST_MESSAGE, InputError

SECONDS, BYTES = 10, 2 * 2**30


def read_or_refused(use, what, *, longest=LONGEST_MESSAGE):
    """`use()` works, or raises an InputError of one short line; within bounds of processor time and memory.

    Bounds are of this call alone, whatever the process has done before. Memory is bounded on Linux alone.
    """
    before, start = _peak(reset=True), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use()
    except InputError as error:
        message = str(error)
        assert len(message) <= longest, what
        assert message.isprintable(), what
    except Exception as error:
        raise AssertionError(what) from error
    assert time.process_time() - start < SECONDS, what
    assert _peak() - before < BYTES, what


def _peak(*, reset=False):
    """Most resident memory of the process in bytes: since it was last reset, or now if it is reset."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def only_our_errors(use, files, root, *words, max_examples=120):
    """Damage one file at a time; `use()` must work or raise an InputError that names `root`.

    `words` are values that occur in the JSON files.
    """
    texts = [path for path in files if path.suffix == ".json"]
    use()

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1), junk(*words))
    def fuzz(seed, value):
        rng = random.Random(seed)
        path = rng.choice(texts) if texts and rng.random() < 0.8 else rng.choice(files)
        data = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.95:
            path.write_text(json.dumps(mutated(json.loads(data), rng, value)))
        else:
            path.write_bytes(damaged(data, rng))
        message = str(root)
        try:
            use()
        except InputError as error:
            message = str(error)
        finally:
            path.write_bytes(data)
        assert str(root) in message

    fuzz()


def junk(*values):
    """Values that are expected nowhere, or are somewhere and are wrong; `values` are worth a try as well."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**20)]),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["../x", "/", "a\0b", "x" * 5000, "007", "52N2", "PPPPPPPP", "ooooo", "1.png"]),
        st.sampled_from([None, *values]),
        st.lists(st.integers(-2, 200), max_size=4),
        st.dictionaries(st.sampled_from(["id", "size", "counts", "rle", "1"]), st.integers(), max_size=2),
    )


def mutated(tree, rng, junk):
    """The tree with one entry, at any depth, replaced, removed, doubled, renamed, misspelt or swapped."""
    tree = copy.deepcopy(tree)
    places = []

    def visit(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(tree)
    node, key = rng.choice(places)
    kind = rng.choice(["replace", "replace", "remove", "double", "rename", "swap", "misspell"])
    if kind == "remove":
        del node[key]
    elif kind == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif kind == "rename" and isinstance(node, dict):
        node[str(junk)[:20]] = node.pop(key)
    elif kind == "swap":
        other, place = rng.choice(places)
        node[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(node[key])
    elif kind == "misspell" and isinstance(node[key], str) and node[key]:
        at = rng.randrange(len(node[key]))
        node[key] = node[key][:at] + chr(rng.randrange(32, 127)) * rng.randrange(3) + node[key][at + 1 :]
    else:
        node[key] = junk
    return tree


def damaged(data, rng):
    """A file's bytes with a byte changed, some cut out, or cut off."""
    at = rng.randrange(len(data)) if data else 0
    changed = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return rng.choice([changed, data[:at], data[:at] + data[at + rng.randrange(1, 9) :], b""])


def put(tree, keys, value):
    """Put a value at the end of a path of keys, or what a function makes of the one before.

    Without keys the function changes the tree itself.
    """
    if not keys:
        value(tree)
        return
    *parents, last = keys
    for key in parents:
        tree = tree[key]
    tree[last] = value(tree[last]) if callable(value) else value


def edit(path, keys, value):
    """`put` in a JSON file."""
    tree = json.loads(path.read_text())
    put(tree, keys, value)
    path.write_text(json.dumps(tree))
