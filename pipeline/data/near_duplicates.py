"""Near-duplicate images by perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_HAMMING_DISTANCE = 4
"""Bits of 64 that scaling, recompression or a caption change. Unrelated photographs differ in about 32."""
MAX_PAIRS_IN_MEMORY = 1 << 22


def near_duplicate_groups(phashes: Sequence[int], max_distance: int = MAX_HAMMING_DISTANCE) -> list[list[int]]:
    """Return groups of positions, connected by hashes that differ in at most `max_distance` bits. Each has two members
    or more; groups and positions are in ascending order.

    Two hashes that differ in d bits agree in at least one of d + 1 segments (pigeonhole principle), so only hashes that
    share a segment are compared.
    """
    if not phashes:
        return []
    values, positions = np.unique(np.array(phashes, dtype=np.uint64), return_inverse=True)
    labels = np.arange(len(values))
    pending: list[np.ndarray] = []  # near-duplicate pairs whose labels are not merged yet
    num_pending = 0
    bounds = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in zip(bounds, bounds[1:]):
        segment = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(segment, kind="stable")
        starts = np.flatnonzero(np.diff(segment[order], prepend=segment[order][:1] ^ np.uint64(1)))
        for bucket in np.split(order, starts[1:]):
            rows = max(1, MAX_PAIRS_IN_MEMORY // len(bucket))
            for start in range(0, len(bucket) if len(bucket) > 1 else 0, rows):
                block = bucket[start : start + rows]
                distances = np.bitwise_count(values[block, None] ^ values[None, bucket])
                row, column = np.nonzero(distances <= max_distance)
                pairs = np.stack([block[row], bucket[column]])
                if not len(unmerged := np.flatnonzero(labels[pairs[0]] != labels[pairs[1]])):
                    continue
                pending.append(pairs[:, unmerged])
                num_pending += len(unmerged)
                if num_pending >= MAX_PAIRS_IN_MEMORY:
                    labels, pending, num_pending = _merge_labels(labels, pending), [], 0
    labels = _merge_labels(labels, pending)
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels[positions].tolist()):
        groups.setdefault(label, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def _merge_labels(labels: np.ndarray, pairs: Sequence[np.ndarray]) -> np.ndarray:
    """Give one label to all positions that the pairs connect."""
    if not pairs:
        return labels

    from scipy.sparse import coo_matrix  # lazily: every worker that reads images imports this module
    from scipy.sparse.csgraph import connected_components

    ends = labels[np.concatenate(pairs, axis=1)]
    graph = coo_matrix((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(len(labels), len(labels)))
    _, components = connected_components(graph, directed=False)
    merged: np.ndarray = components[labels]
    return merged
