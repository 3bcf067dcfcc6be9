"""Warnings about a grouping, with what to try instead."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import UserError
from pipeline.grouping.affinities import Advice, Gradient, Transfer, get_advice
from pipeline.grouping.objectives import get_objective
from pipeline.grouping.partition import Partition, validate_affinity

DOMINANT_NORM_RATIO = 3.0
"""A task is reported if its gradient norm is at least this many times the median of the other tasks."""


def grouping_warnings(
    affinity: np.ndarray,
    partition: Partition,
    task_names: Sequence[str],
    *,
    objective: str,
    kind: str,
    similarity: str | None = None,
    per_layer: bool = False,
) -> list[str]:
    """Return warnings as sentences; an empty list if there are none.

    They cover a search without proof of optimality, a collapse into one group or into single tasks although other
    partitions were allowed, affinities that are all zero; for gradients tasks with zero gradients and, for dot
    products, a task whose gradient norm dominates; for transfer tasks whose own prompts do not help them.

    Args:
        affinity: (T, T), the matrix that was partitioned.
        partition: the result of `best_partition`.
        task_names: T names.
        objective: name of the objective that the partition maximizes.
        kind: name of the affinity; with the objective it determines the advice.
        similarity: name of the similarity of gradients, for the affinity `gradient`.
        per_layer: whether affinities are means over layers.

    Raises:
        UserError: the matrix is not square, symmetric and finite; the number of names is not T.
    """
    affinity = validate_affinity(affinity)
    if len(task_names) != len(affinity):
        raise UserError(f"{len(task_names)} task names for an affinity matrix of {len(affinity)} tasks")
    warnings = []
    if not partition.is_optimal:
        warnings.append(
            f"Not proven optimal: the search reached its time limit. The groups score {partition.score:.6g}, the upper "
            f"bound is {partition.upper_bound:.6g}. Increase --grouping.time_limit_s."
        )
    advice = get_advice(kind, similarity)
    warnings += _collapse_warnings(affinity, partition, objective, advice, per_layer)
    if kind == Gradient.name:
        warnings += _norm_warnings(affinity, task_names, advice)
    if kind == Transfer.name:
        warnings += _gain_warnings(affinity, task_names)
    return warnings


def _collapse_warnings(
    affinity: np.ndarray, partition: Partition, objective: str, measure: Advice, per_layer: bool
) -> list[str]:
    num_tasks = len(affinity)
    pairs = affinity[np.triu_indices(num_tasks, 1)]
    if partition.num_candidates == 1 or num_tasks == 1:
        return []
    if not pairs.any():
        return ["All affinities between tasks are zero: the grouping carries no information about the tasks."]
    if len(partition.groups) == 1:
        goal = get_objective(objective)
        if (pairs > 0).all():
            reason = "every pairwise affinity is positive" + (
                f", so under objective {objective!r} no split can score higher" if goal.split_reward == 1 else ""
            )
        elif (pairs >= 0).all():
            reason = "no pairwise affinity is negative"
        else:
            reason = "the positive affinities outweigh the negative ones in every split"
        finer = " or ".join(f"{candidate.name}{candidate.remark}" for candidate in goal.finer_objectives())
        advice = f"--grouping.objective {finer}, " if finer else ""
        advice += "a number of groups (--grouping.num_groups 2) or their --grouping.max_size"
        if not (per_layer and measure.per_layer_helps):
            advice += f"; {measure.one_group_advice}"
        return [f"All {num_tasks} tasks are in one group: {reason}. To split it, try {advice}."]
    if len(partition.groups) == num_tasks:
        reason = measure.conflict if (pairs <= 0).all() else "no group scores higher"
        return [
            f"Every group has a single task: {reason}, so no two tasks share a prompt. To group the least conflicting "
            "tasks anyway, set --grouping.num_groups or --grouping.min_size 2."
        ]
    return []


def _gain_warnings(affinity: np.ndarray, task_names: Sequence[str]) -> list[str]:
    """Return a warning if tasks do not gain from their own prompts; gains of others then say little."""
    losing = [f"{name} ({gain:+.3g})" for name, gain in zip(task_names, np.diag(affinity)) if gain <= 0]
    if not losing:
        return []
    return [
        "Prompts that were trained on a task alone do not lower the loss of its own training images below zero-shot "
        f"CLIP's: {', '.join(losing)}. The affinities of these tasks say little; change --training.epochs or "
        "--training.learning_rate until training alone helps."
    ]


def _norm_warnings(affinity: np.ndarray, task_names: Sequence[str], measure: Advice) -> list[str]:
    warnings = []
    norms = np.sqrt(np.clip(np.diag(affinity), 0, None))
    zero_tasks = [repr(name) for name, norm in zip(task_names, norms, strict=True) if norm == 0]
    if zero_tasks:
        warnings.append(
            f"Gradients are zero in every snapshot for: {', '.join(zero_tasks)}. Their affinities are 0 and carry no "
            "information; check that their loss depends on the shared prompt."
        )
    largest = int(np.argmax(norms))
    other_norms = np.delete(norms, largest)
    other_norms = other_norms[other_norms > 0]
    remedy = measure.dominance_advice
    if remedy and other_norms.size and norms[largest] >= DOMINANT_NORM_RATIO * np.median(other_norms):
        warnings.append(
            f"Task {task_names[largest]!r} has by far the largest gradients (root mean square norm "
            f"{norms[largest]:.3g}, median of the other tasks {np.median(other_norms):.3g}), so {remedy}."
        )
    return warnings
