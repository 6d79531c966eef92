"""Start a run from the weights of another run that has other classes.

Everything goes by name. Class queries go by class set and row: a set that both runs have keeps its rows;
Cityscapes-VPS and KITTI-STEP start from the rows of the same classes of Cityscapes; the others stay as
initialised.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tarvis.datasets.classes import class_table
from tarvis.model.weights import WeightsError

QUERIES = "queries.semantic"
SAME_CLASSES = {"cityscapes_vps": "cityscapes", "kitti_step": "cityscapes"}
"""Sets whose classes have the same names in another set."""
OF_BACKBONE = ("backbone.", "neck.input_proj.", "neck.adapter_1.")
"""The image backbone, and the layers whose shapes follow from its maps."""


def with_backbone_of(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights `state` with the image backbone of `model` and the layers that read its maps."""
    kept = {name: value for name, value in state.items() if not name.startswith(OF_BACKBONE)}
    return kept | {name: v for name, v in model.state_dict().items() if name.startswith(OF_BACKBONE)}


def transfer(
    model: nn.Module, class_sets: Mapping[str, int], state: Mapping[str, Tensor], from_sets: Mapping[str, int]
) -> list[str]:
    """Give `model`, which knows `class_sets`, the weights `state` of one that knows `from_sets`.

    Returns:
        the class sets whose queries stay as initialised.

    Raises:
        WeightsError: a weight other than the class queries is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in own.items()
        if name in state and name != QUERIES and state[name].shape != value.shape
    ]
    expected = 1 + sum(from_sets.values())
    if QUERIES in state and state[QUERIES].shape[1:] != own[QUERIES].shape[1:]:
        width = own[QUERIES].shape[1]
        problems.append(f"{QUERIES} is {list(state[QUERIES].shape)}, expected rows of {width}")
    elif QUERIES in state and len(state[QUERIES]) != expected:
        problems.append(f"{QUERIES} has {len(state[QUERIES])} rows, but its class sets say {expected}")
    if problems:
        raise WeightsError(f"{len(problems)} weights do not fit: {'; '.join(problems[:20])}")
    rows, fresh = class_rows(class_sets, from_sets)
    queries = own[QUERIES].clone()
    target, source = torch.tensor([[0, 0], *rows]).T
    queries[target] = state[QUERIES][source].to(queries)
    model.load_state_dict({**state, QUERIES: queries})
    return fresh


def class_rows(to: Mapping[str, int], given: Mapping[str, int]) -> tuple[list[tuple[int, int]], list[str]]:
    """Pairs of rows (to, from) of the matrices of class queries, and the sets that get none."""
    pairs, fresh = [], []
    starts, from_starts = _starts(to), _starts(given)
    for name, count in to.items():
        if given.get(name) == count:
            pairs += [(starts[name] + k, from_starts[name] + k) for k in range(count)]
        elif (
            (other := SAME_CLASSES.get(name)) is not None
            and count == class_table(name).num_classes
            and given.get(other) == class_table(other).num_classes
        ):
            names = class_table(other).names
            for k, each in enumerate(class_table(name).names):
                pairs.append((starts[name] + k, from_starts[other] + names.index(each)))
        else:
            fresh.append(name)
    return pairs, fresh


def _starts(class_sets: Mapping[str, int]) -> dict[str, int]:
    starts, row = {}, 1  # row 0 is the position that all share
    for name, count in class_sets.items():
        starts[name] = row
        row += count
    return starts
