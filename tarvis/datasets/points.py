"""The point that gives an object: where its mask is thickest."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def inner_point(mask: NDArray[np.bool_], *, edge_is_border: bool = True) -> tuple[int, int]:
    """(row, column) of the pixel farthest from the mask's border; of several, the nearest to the centroid.

    Distances are Euclidean, to the nearest pixel outside; nearness is |dy| + |dx|. The edge of the picture
    counts as a border, unlike in the original, where an object cut by the edge got its point on the edge, and
    a mask of the whole picture got none. `edge_is_border=False` does as the original.

    Raises:
        ValueError: the mask [H, W] is empty.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not rows.size:
        raise ValueError("an empty mask has no point")
    top, left = int(rows[0]), int(columns[0])
    box = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    # sides of the box beyond which there are pixels outside the mask
    around = [True, True, True, True]
    if not edge_is_border:
        H, W = mask.shape
        around = [top > 0, rows[-1] + 1 < H, left > 0, columns[-1] + 1 < W]
    padding = tuple(map(int, around))
    framed = np.pad(box, (padding[:2], padding[2:])).view(np.uint8)
    distance = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    squared = np.rint(np.square(distance))  # exact: they are sums of two squares
    candidates = np.argwhere(squared == squared.max())
    centroid = np.argwhere(framed).mean(0)
    row, column = candidates[np.abs(candidates - centroid).sum(1).argmin()]
    return int(row) + top - padding[0], int(column) + left - padding[2]
