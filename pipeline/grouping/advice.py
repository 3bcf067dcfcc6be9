"""What a user should know before trusting a grouping, and what to try instead, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.affinities import get_affinity
from pipeline.grouping.objectives import get_objective
from pipeline.grouping.partition import Partition, validate_affinity

DOMINANT_NORM_RATIO = 3.0
"""A task is warned about when its gradients are this many times as long as the others' median."""


def grouping_warnings(
    affinity: np.ndarray,
    partition: Partition,
    task_names: Sequence[str],
    *,
    objective: str,
    kind: str,
    per_layer: bool = False,
) -> list[str]:
    """Sentences; empty when nothing stands out.

    Covers a search that ended without proof, that collapsed into one group or into single tasks although it had a
    choice, affinities that are all zero, tasks without any gradient, and, for dot products, a task whose gradient norm
    dominates.

    Args:
        affinity: (T, T), the matrix the partition was found for.
        partition: what `best_partition` returned.
        task_names: T names.
        objective: the name of the objective the partition maximizes.
        kind: the affinity; with the objective it decides what is worth trying instead.
        per_layer: whether affinities are means of layers' own.

    Raises:
        UserError: the matrix is not square, symmetric and finite; the number of names is not T.
    """
    affinity = validate_affinity(affinity)
    if len(task_names) != len(affinity):
        raise UserError(f"{len(task_names)} task names for an affinity matrix of {len(affinity)} tasks")
    warnings = []
    if not partition.is_optimal:
        warnings.append(
            f"Best found, not proven best: the search ended at its time limit. The groups score {partition.score:.6g}, "
            f"and no partition scores more than {partition.upper_bound:.6g}. A longer time_limit_s helps."
        )
    warnings += _collapse(affinity, partition, objective, kind, per_layer)
    return warnings + _norms(affinity, task_names, kind)


def _collapse(affinity: np.ndarray, partition: Partition, objective: str, kind: str, per_layer: bool) -> list[str]:
    num_tasks = len(affinity)
    pairs = affinity[np.triu_indices(num_tasks, 1)]
    if partition.num_candidates == 1 or num_tasks == 1:
        return []
    if not pairs.any():
        return ["All affinities between tasks are zero: the grouping says nothing about the tasks."]
    if len(partition.groups) == 1:
        goal, compared = get_objective(objective), get_affinity(kind)
        if (pairs > 0).all():
            reason = "every pairwise affinity is positive" + (
                f", so under objective {objective!r} no split can score higher" if goal.rewards_splitting == 1 else ""
            )
        elif (pairs >= 0).all():
            reason = "no pairwise affinity is negative"
        else:
            reason = "the positive affinities outweigh the negative ones in every split"
        others = " or ".join(f"{other.name!r}{other.remark}" for other in goal.finer())
        advice = f"objective {others}, " if others else ""
        advice += "a fixed number of groups (num_groups=2) or a max_size"
        if not (per_layer and compared.per_layer_helps):
            advice += f"; {compared.one_group_advice}"
        return [f"All {num_tasks} tasks are in one group: {reason}. To split it, try {advice}."]
    if len(partition.groups) == num_tasks:
        reason = "no pairwise affinity is positive" if (pairs <= 0).all() else "no group scores higher"
        return [
            f"Every task is alone: {reason}, so no two tasks share a prompt. To group the least conflicting "
            "tasks all the same, set num_groups or min_size=2."
        ]
    return []


def _norms(affinity: np.ndarray, task_names: Sequence[str], kind: str) -> list[str]:
    warnings = []
    norms = np.sqrt(np.clip(np.diag(affinity), 0, None))
    still = [repr(name) for name, norm in zip(task_names, norms, strict=True) if norm == 0]
    if still:
        warnings.append(
            f"Gradients that are zero in every snapshot: {', '.join(still)}. Their affinities are 0 and say "
            "nothing; does the loss reach the shared prompt?"
        )
    largest = int(np.argmax(norms))
    others = np.delete(norms, largest)
    others = others[others > 0]
    remedy = get_affinity(kind).dominance_advice
    if remedy and others.size and norms[largest] >= DOMINANT_NORM_RATIO * np.median(others):
        warnings.append(
            f"Task {task_names[largest]!r} has by far the largest gradients (root mean square norm "
            f"{norms[largest]:.3g}, median of the others {np.median(others):.3g}), so {remedy}."
        )
    return warnings
