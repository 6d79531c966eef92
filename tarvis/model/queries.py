"""The learned queries, one group a kind of target (paper, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tarvis.structures import InputError, Queries


class QueryEmbeddings(nn.Module):
    """Row 0 of each matrix is the position shared by its group, the rows below are initial contents.

    `semantic` holds the classes of all class sets, one set after the other in the order of `class_sets`.
    `background_vos` has contents too (they come with the published weights), but those of object tasks come
    from the object encoder, so only its row 0 is read; `vos` is a position alone.
    """

    def __init__(self, dim: int, num_instance_queries: int, class_sets: dict[str, int]) -> None:
        super().__init__()
        self.class_sets = dict(class_sets)
        self.semantic = nn.Parameter(torch.randn(1 + sum(class_sets.values()), dim))
        self.background = nn.Parameter(torch.randn(2, dim))
        self.background_vos = nn.Parameter(torch.randn(2, dim))
        self.instance = nn.Parameter(torch.randn(1 + num_instance_queries, dim))
        self.vos = nn.Parameter(torch.randn(1, dim))

    def classes(self, class_set: str, batch_size: int = 1) -> Queries:
        """Instance, background and semantic queries for finding all targets of a class set (VIS, VPS).

        Raises:
            InputError: the weights have no such class set.
        """
        if class_set not in self.class_sets:
            known = ", ".join(self.class_sets) or "none"
            raise InputError(f"these weights have no class set {class_set!r}; they have: {known}")
        names = list(self.class_sets)
        start = 1 + sum(self.class_sets[name] for name in names[: names.index(class_set)])
        semantic = self.semantic[start : start + self.class_sets[class_set]]
        groups = {
            "instance": (self.instance[1:], self.instance[0]),
            "background": (self.background[1:], self.background[0]),
            "semantic": (semantic, self.semantic[0]),
        }
        content = torch.cat([rows for rows, _ in groups.values()])  # [Q, C]
        position = torch.cat([row.expand_as(rows) for rows, row in groups.values()])
        return Queries(
            content.expand(batch_size, -1, -1),
            position.expand(batch_size, -1, -1),
            {name: rows.shape[0] for name, (rows, _) in groups.items()},
        )

    def objects(self, background: Tensor, objects: Tensor) -> Queries:
        """Queries for given objects (VOS, PET) from the object encoder: [B, 16, C] and [B, N, C]."""
        position = torch.cat((self.background_vos[:1].expand_as(background), self.vos.expand_as(objects)), 1)
        groups = {"background_vos": background.shape[1], "vos": objects.shape[1]}
        return Queries(torch.cat((background, objects), 1), position, groups)
