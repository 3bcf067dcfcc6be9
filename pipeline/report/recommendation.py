"""Recommendation from the accuracies of a run or a benchmark, in one sentence: train each task alone, all in one group,
or the groups found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

from pipeline.grouping.text import describe_groups
from pipeline.methods.registry import DEFAULT_VARIANTS
from pipeline.report.scores import Estimate, ScoresByTask, average_difference
from pipeline.report.summary import ZERO_SHOT, method_title

EACH_ALONE, ALL_IN_ONE, GROUPED = DEFAULT_VARIANTS
STRATEGIES = (ZERO_SHOT, EACH_ALONE, ALL_IN_ONE, GROUPED)
"""Simplest first: no training; no task that depends on others; no grouping to find; groups."""
FAMILY_ERROR, NUM_COMPARISONS = 0.05, 3
"""Probability that chance alone makes one of the three trainings differ significantly from another, and the number of
their pairs (Bonferroni)."""
QUANTILE = 1 - FAMILY_ERROR / NUM_COMPARISONS / 2
SIGNIFICANT_ERRORS = NormalDist().inv_cdf(QUANTILE)
"""2.39 standard errors; of a mean over few runs more, by Student's t."""

Groups = Sequence[Sequence[str]]
Differences = Mapping[str, Mapping[str, Estimate]]
"""Strategy → other method → mean over tasks of the strategy's accuracy minus the other's."""


def strategy_differences(scores: Mapping[str, ScoresByTask]) -> dict[str, dict[str, Estimate]]:
    """Return the differences between the strategies and all methods, on the same test images."""
    return {
        strategy: {name: average_difference(scores[strategy], scores[name]) for name in scores if name != strategy}
        for strategy in STRATEGIES
        if strategy in scores
    }


def recommended_strategy(differences: Differences, groups: Groups | None) -> str:
    """Return the simplest strategy that no other exceeds by more than one standard error of their difference.

    This is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3) with
    paired differences.

    Args:
        groups: the groups found; None: several groupings, of different runs.
    """
    names = _distinct_strategies(differences, groups)

    def is_exceeded(name: str) -> bool:
        estimates = (differences[rival][name] for rival in names if rival != name)
        return any(estimate.value > estimate.standard_error for estimate in estimates)

    return next(name for name in names if not is_exceeded(name))


def recommendation(
    differences: Differences, groups: Groups | None, significant_errors: float = SIGNIFICANT_ERRORS
) -> str:
    """Return the recommended strategy and its differences from the others as a sentence, and with baselines another one
    about the best of them; empty if fewer than two strategies are compared.

    Args:
        groups: as of `recommended_strategy`.
        significant_errors: number of standard errors beyond which a difference is significant.
    """
    if len(differences) < 2:
        return ""
    recommended = recommended_strategy(differences, groups)
    rivals = [name for name in _distinct_strategies(differences, groups) if name != recommended]
    rivals.sort(key=lambda name: name == ZERO_SHOT)  # last
    clauses = [
        _comparison(differences[recommended][name], _strategy_name(name, groups), significant_errors) for name in rivals
    ]
    sentence = f"{_instruction(recommended, groups)}: {'; '.join(clauses)}."
    baselines = [name for name in differences[recommended] if name not in STRATEGIES]
    if not baselines:
        return sentence
    best = min(baselines, key=lambda name: differences[recommended][name].value)
    loss = differences[recommended][best]
    gain = Estimate(-loss.value, loss.standard_error)
    comparison = _comparison(gain, "that", significant_errors)
    return f"{sentence} The best other method, {method_title(best)}, is {comparison}."


def _distinct_strategies(differences: Differences, groups: Groups | None) -> list[str]:
    """Return the strategies in order of simplicity, without those that train the same groups as a simpler one."""
    names = [name for name in STRATEGIES if name in differences]
    equal = [name for name in names if name in _strategies_with(groups)]
    return [name for name in names if name not in equal[1:]]


def _strategies_with(groups: Groups | None) -> list[str]:
    """Return the strategies that train the groups found, simplest first."""
    if groups is None:
        return [GROUPED]
    is_alone, is_one_group = all(len(group) == 1 for group in groups), len(groups) == 1
    return [*([EACH_ALONE] if is_alone else []), *([ALL_IN_ONE] if is_one_group else []), GROUPED]


def _comparison(estimate: Estimate, rival: str, significant_errors: float) -> str:
    """Describe a difference from `rival` in points."""
    value, error = 100 * estimate.value, 100 * estimate.standard_error
    if value == error == 0:
        return f"equal to {rival}"
    if abs(value) <= error:
        return f"on a level with {rival}, {round(value, 1) + 0.0:+.1f} ± {error:.1f} points"  # + 0.0: no -0.0
    side = "above" if value > 0 else "below"
    doubt = "" if abs(value) > significant_errors * error else ", which may be chance"
    return f"{abs(value):.1f} ± {error:.1f} points {side} {rival}{doubt}"


def _instruction(strategy: str, groups: Groups | None) -> str:
    if strategy == ZERO_SHOT:
        return "Train nothing and use zero-shot CLIP"
    is_only_task = groups is not None and sum(map(len, groups)) == 1
    return "Train the task" if is_only_task else f"Train {_strategy_name(strategy, groups)}"


def _strategy_name(strategy: str, groups: Groups | None) -> str:
    if strategy == ZERO_SHOT:
        return "zero-shot CLIP"
    if strategy == GROUPED:
        return f"the groups found ({describe_groups(groups)})" if groups else "the groups found"
    name = "each task alone" if strategy == EACH_ALONE else "all tasks in one group"
    return f"{name} (the grouping's choice)" if strategy in _strategies_with(groups) else name
