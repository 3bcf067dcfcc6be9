"""Images that look alike, by their perceptual hashes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_HAMMING_DISTANCE = 4
"""Of 64: what scaling, another quality, or a caption change. Unrelated photographs differ in about 32."""
MAX_PAIRS_IN_MEMORY = 1 << 22


def near_duplicate_groups(phash: Sequence[int], max_distance: int = MAX_HAMMING_DISTANCE) -> list[list[int]]:
    """Return groups of positions, connected by hashes that differ in at most `max_distance` bits. Each has two members
    or more; groups and positions are in ascending order.

    Two hashes that differ in d bits agree in at least one of d + 1 segments (pigeonhole principle), so only hashes that
    share a segment are compared.
    """
    if not phash:
        return []
    values, position = np.unique(np.array(phash, dtype=np.uint64), return_inverse=True)
    label = np.arange(len(values))
    waiting: list[np.ndarray] = []  # pairs that are alike and not yet under one label
    num_waiting = 0
    bounds = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in zip(bounds, bounds[1:]):
        piece = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        starts = np.flatnonzero(np.diff(piece[order], prepend=piece[order][:1] ^ np.uint64(1)))
        for of_piece in np.split(order, starts[1:]):
            rows = max(1, MAX_PAIRS_IN_MEMORY // len(of_piece))
            for start in range(0, len(of_piece) if len(of_piece) > 1 else 0, rows):
                block = of_piece[start : start + rows]
                differing = np.bitwise_count(values[block, None] ^ values[None, of_piece])
                at, to = np.nonzero(differing <= max_distance)
                pairs = np.stack([block[at], of_piece[to]])
                if not len(at := np.flatnonzero(label[pairs[0]] != label[pairs[1]])):
                    continue
                waiting.append(pairs[:, at])
                num_waiting += len(at)
                if num_waiting >= MAX_PAIRS_IN_MEMORY:
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
