"""Images that look alike, by their perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_BITS = 4
"""Of 64: what scaling, another quality, or a caption change. Unrelated photographs differ in about 32."""
PAIRS_AT_ONCE = 1 << 22


def near_duplicate_groups(phash: Sequence[int], most_bits: int = MOST_BITS) -> list[list[int]]:
    """Groups of positions whose hashes differ in at most `most_bits` bits from that of another of the group; those of
    one alone are left out. Groups and positions are in ascending order.

    Two hashes that differ in d bits agree in at least one of d + 1 pieces of them, so only those that agree in a piece
    are compared.
    """
    if not phash:
        return []
    values, position = np.unique(np.array(phash, dtype=np.uint64), return_inverse=True)
    label = np.arange(len(values))
    waiting: list[np.ndarray] = []  # pairs that are alike and not yet under one label
    num_waiting = 0
    bounds = np.linspace(0, 64, most_bits + 2).astype(int)
    for low, high in zip(bounds, bounds[1:]):
        piece = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.diff(piece[order], prepend=piece[order][:1] ^ np.uint64(1)))
        for of_piece in np.split(order, starts[1:]):
            rows = max(1, PAIRS_AT_ONCE // len(of_piece))
            for start in range(0, len(of_piece) if len(of_piece) > 1 else 0, rows):
                block = of_piece[start : start + rows]
                differing = np.bitwise_count(values[block, None] ^ values[None, of_piece])
                at, to = np.nonzero(differing <= most_bits)
                pairs = np.stack([block[at], of_piece[to]])
                if not len(at := np.flatnonzero(label[pairs[0]] != label[pairs[1]])):
                    continue
                waiting.append(pairs[:, at])
                num_waiting += len(at)
                if num_waiting >= PAIRS_AT_ONCE:
                    label, waiting, num_waiting = _joined(label, waiting), [], 0
    label = _joined(label, waiting)
    groups: dict[int, list[int]] = {}
    for of, group in enumerate(label[position].tolist()):
        groups.setdefault(group, []).append(of)
    return [group for group in groups.values() if len(group) > 1]


def _joined(label: np.ndarray, pairs: Sequence[np.ndarray]) -> np.ndarray:
    """The labels, one for all that the pairs connect."""
    if not pairs:
        return label

    from scipy.sparse import coo_matrix  # every worker that reads images imports this module
    from scipy.sparse.csgraph import connected_components

    ends = label[np.concatenate(pairs, axis=1)]
    graph = coo_matrix((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(len(label), len(label)))
    _, of_label = connected_components(graph, directed=False)
    joined: np.ndarray = of_label[label]
    return joined
