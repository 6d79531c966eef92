"""What files call classes, checked against the class tables."""

from __future__ import annotations

from tarvis.datasets.classes import ClassTable
from tarvis.files.records import Entry


def labels_by_id(root: Entry, table: ClassTable) -> dict[int, int]:
    """The label, counted from 0, of every category id of `table`.

    Editions of a benchmark differ in what their ids mean, and nothing but the names shows it: where the file
    lists its `categories`, no class may have another id than in the table. Other names are let pass.

    Raises:
        InputError: one has.
    """
    ids: dict[str, set[int]] = {}
    for name, category in zip(table.names, table.ids, strict=True):
        ids.setdefault(_plain(name), set()).add(category)
    listed = root.get("categories")
    for entry in listed.entries() if listed else ():
        name, category = entry["name"].text(), entry["id"].integer(-1)
        expected = ids.get(_plain(name), {category})
        if category not in expected:
            raise entry["id"].error(
                f"{name!r} is category {category}, but {min(expected)} in {table.name}: another edition?"
            )
    return {category: label for label, category in enumerate(table.ids)}


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")
