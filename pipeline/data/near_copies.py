"""Images that look alike, by their perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

MOST_BITS = 4
"""Of 64: what scaling, another quality, or a caption change. Unrelated photographs differ in about 32."""
PAIRS_AT_ONCE = 1 << 22


def alike(looks: Sequence[int], most_bits: int = MOST_BITS) -> list[list[int]]:
    """Groups of positions whose hashes differ in at most `most_bits` bits from that of another of the group; those of
    one alone are left out. Groups and positions are in ascending order.

    Two hashes that differ in d bits agree in at least one of d + 1 pieces of them, so only those that agree in a piece
    are compared.
    """
    if not looks:
        return []
    values, position = np.unique(np.array(looks, dtype=np.uint64), return_inverse=True)
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    bounds = np.linspace(0, 64, most_bits + 2).astype(int)
    for low, high in zip(bounds, bounds[1:]):
        piece = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.diff(piece[order], prepend=piece[order][:1] ^ np.uint64(1)))
        for of_piece in np.split(order, starts[1:]):
            rows = max(1, PAIRS_AT_ONCE // len(of_piece))
            for start in range(0, len(of_piece) if len(of_piece) > 1 else 0, rows):
                some = of_piece[start : start + rows]
                differing = np.bitwise_count(values[some, None] ^ values[None, of_piece])
                at, to = np.nonzero(differing <= most_bits)
                left.append(some[at])
                right.append(of_piece[to])
    if left:
        edges = (np.concatenate(left), np.concatenate(right))
        graph = coo_matrix((np.ones(len(edges[0]), bool), edges), shape=(len(values), len(values)))
        _, label = connected_components(graph, directed=False)
    else:
        label = np.arange(len(values))
    groups: dict[int, list[int]] = {}
    for at, group in enumerate(label[position].tolist()):
        groups.setdefault(group, []).append(at)
    return [group for group in groups.values() if len(group) > 1]
