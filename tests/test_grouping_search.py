"""Every way to search partitions against plain enumeration, and what constraints are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_partitions import OBJECTIVES, best_by_plain_enumeration, meets_constraints, plain_score

from pipeline.errors import UserError
from pipeline.grouping import partition
from pipeline.grouping.objectives import OBJECTIVES as REGISTERED
from pipeline.grouping.objectives import find_objective
from pipeline.grouping.partition import Partition, best_partition
from pipeline.grouping.search import integer_program, local_search
from pipeline.grouping.search.assignment import feasible_labels
from pipeline.grouping.search.components import components
from pipeline.grouping.search.constraints import check_constraints
from pipeline.grouping.search.integer_program import IntegerProgram
from pipeline.grouping.search.local_search import heuristic_partition, improve_partition
from pipeline.grouping.search.problem import Problem
from pipeline.grouping.search.subsets import best_by_subsets

BELL_NUMBERS = [1, 1, 2, 5, 15, 52, 203, 877, 4140, 21147, 115975, 678570, 4213597]


# --- problems ------------------------------------------------------------------------------------------


def random_symmetric(num_tasks: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(num_tasks, num_tasks))
    return matrix + matrix.T


def clustered(num_tasks: int, num_clusters: int, noise: float, seed: int) -> np.ndarray:
    """Cosines of random gradients around some directions."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(num_clusters, 500))
    gradients = directions[rng.integers(0, num_clusters, num_tasks)] + noise * rng.normal(size=(num_tasks, 500))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients @ gradients.T


@st.composite
def searches(draw, most_tasks: int = 7):
    """A symmetric matrix, generic or with few distinct values (ties), an objective, and constraints."""
    num_tasks = draw(st.integers(1, most_tasks))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (num_tasks, num_tasks)
    matrix = draw(
        st.sampled_from(
            [
                rng.normal(size=shape) * 10.0 ** draw(st.integers(-9, 9)),
                rng.normal(size=shape) - 0.7,
                rng.integers(-1, 2, size=shape).astype(float),
                rng.integers(-2, 1, size=shape).astype(float),
                rng.integers(0, 2, size=shape) * 0.1,
                rng.integers(-3, 4, size=shape) / 3.0,
            ]
        )
    )
    min_size = draw(st.integers(1, min(3, num_tasks)))
    lists = st.lists(st.lists(st.integers(0, num_tasks - 1), min_size=2, max_size=3, unique=True), max_size=2)
    constraints = {
        "num_groups": draw(st.none() | st.integers(1, num_tasks)),
        "min_size": min_size,
        "max_size": draw(st.none() | st.integers(min_size, num_tasks + 1)),
        "must_link": draw(lists) if num_tasks > 2 else [],
        "cannot_link": draw(lists) if num_tasks > 2 else [],
    }
    return np.triu(matrix) + np.triu(matrix, 1).T, draw(st.sampled_from(OBJECTIVES)), constraints


def made_problem(affinity: np.ndarray, objective: str, **constraints) -> Problem:
    return Problem.of(affinity, find_objective(objective), **constraints)


# --- all ways agree -------------------------------------------------------------------------------------


def by_components(problem: Problem) -> list[tuple[int, ...]]:
    return [
        tuple(part[unit] for unit in group)
        for part in components(problem)
        for group in best_by_subsets(problem.contract_must_links([[unit] for unit in part]))
    ]


@settings(max_examples=400, deadline=None)
@given(searches())
def test_every_exact_way_gives_the_partition_of_plain_enumeration(search):
    affinity, objective, constraints = search
    expected = best_by_plain_enumeration(affinity, objective, **constraints)
    if expected is None:
        with pytest.raises(UserError, match=r"impossible|cannot be split|at once|must be together"):
            best_partition(affinity, objective=objective, **constraints)
        return
    groups, score, num_candidates = expected
    problem = made_problem(affinity, objective, **constraints)
    for way in (best_by_subsets, by_components):
        assert problem.task_groups(way(problem)) == groups, way
    found = best_partition(affinity, objective=objective, **constraints)
    assert (found.groups, found.num_candidates, found.is_optimal) == (groups, num_candidates, True)
    assert found.score == pytest.approx(score, rel=0, abs=1e-11 * max(1.0, np.abs(affinity).sum()))


def worst_start(problem: Problem) -> list[tuple[int, ...]]:
    labels = feasible_labels(problem, 10)
    return [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]


@settings(max_examples=100, deadline=None)
@given(searches())
def test_the_integer_program_reaches_the_best_score(search):
    affinity, objective, constraints = search
    expected = best_by_plain_enumeration(affinity, objective, **constraints)
    assume(expected is not None)
    problem = made_problem(affinity, objective, **constraints)
    assume(problem.num_nodes > 1)
    groups, bound = IntegerProgram(problem).solve(worst_start(problem), 30)
    assert meets_constraints(problem.task_groups(groups), **constraints)
    assert problem.score(groups) == pytest.approx(expected[1], rel=0, abs=2e-6 * max(1e-9, np.abs(affinity).max()))
    assert bound == problem.score(groups)


@settings(max_examples=60, deadline=None)
@given(searches(most_tasks=7), st.integers(4, 6))
def test_a_local_search_meets_the_constraints_and_claims_no_more_than_it_has(search, most_parts):
    """With a few parts a round, as for many tasks."""
    affinity, objective, constraints = search
    expected = best_by_plain_enumeration(affinity, objective, **constraints)
    assume(expected is not None)
    problem = made_problem(affinity, objective, **constraints)
    assume(problem.num_nodes > 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_search, "MOST_PARTS", most_parts)
        patch.setattr(local_search, "NUM_ANNEALINGS", 1)
        patch.setattr(local_search, "ROUNDS", 4)
        first = heuristic_partition(problem, 5)
        groups = improve_partition(problem, first, 5)
    assert meets_constraints(problem.task_groups(groups), **constraints)
    assert problem.score(groups) >= problem.score(first) - problem.tie * problem.num_nodes
    assert problem.score(groups) <= expected[1] + 1e-11 * max(1.0, np.abs(affinity).sum())


class CountingClock:
    """Stands for the module `time`: every look at it is a second later, so that a search ends after so many looks."""

    def __init__(self):
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return float(self.looks)


LOCAL_SEARCHES = {
    "no constraints": {},
    "number of groups": {"num_groups": 3},
    "sizes": {"min_size": 2, "max_size": 3},
    "equal sizes": {"min_size": 2, "max_size": 2},
    "together and apart": {"must_link": [[0, 3], [1, 4]], "cannot_link": [[0, 1, 2]]},
}


@pytest.mark.parametrize("name", LOCAL_SEARCHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_local_search_solves_most_small_problems(monkeypatch, objective, name):
    """In rounds of five parts, so that it has to go through partitions that are not the best."""
    monkeypatch.setattr(local_search, "MOST_PARTS", 5)
    monkeypatch.setattr(local_search, "NUM_ANNEALINGS", 2)
    monkeypatch.setattr(local_search, "ROUNDS", 8)
    solved = 0
    for seed in range(4):
        problem = made_problem(random_symmetric(8, seed), objective, **LOCAL_SEARCHES[name])
        groups = improve_partition(problem, heuristic_partition(problem, 60), 60)
        solved += problem.score(groups) >= problem.score(best_by_subsets(problem)) - 1e-9
    assert solved >= 3


def test_annealing_gets_out_of_local_optima(monkeypatch):
    monkeypatch.setattr(local_search, "MOST_PARTS", 7)
    monkeypatch.setattr(local_search, "NUM_ANNEALINGS", 1)
    gains = []
    for seed in range(3):
        problem = made_problem(random_symmetric(24, seed), "sum", num_groups=4)
        first = heuristic_partition(problem, 60)
        gains.append(problem.score(improve_partition(problem, first, 60)) - problem.score(first))
    assert max(gains) > 0.1


@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 3}, {"max_size": 3, "must_link": [[0, 1]], "cannot_link": [[2, 3]]}]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bounds_of_searches_that_end_early_are_never_below_the_best(monkeypatch, objective, constraints):
    """The integer program on small problems, stopped after any number of rounds."""
    gaps = []
    for seed in range(4):
        problem = made_problem(random_symmetric(9, seed), objective, **constraints)
        best = problem.score(best_by_subsets(problem))
        positive = np.clip(np.triu(random_symmetric(9, seed), 1), 0, None).sum()
        most = positive * REGISTERED[objective].pair_weight(2)  # if no pair that costs had to be joined
        for seconds in (1, 2, 3, 4, 6, 10, 100):
            monkeypatch.setattr(integer_program, "time", CountingClock())
            groups, bound = IntegerProgram(problem).solve(worst_start(problem), seconds)
            assert problem.score(groups) <= best + 1e-9 and bound >= best - 1e-6
            assert bound <= most + 1e-6
            gaps.append(bound - problem.score(groups))
    assert min(gaps) == 0 and max(gaps) > 0  # with and without proof


@pytest.mark.parametrize("constraints", [{}, {"num_groups": 3}, {"must_link": [[0, 1]], "cannot_link": [[2, 3]]}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_partition_without_proof_has_a_bound_above_the_best(monkeypatch, objective, constraints):
    """`best_partition` as for many tasks, on few, so that the best is known."""
    monkeypatch.setattr(local_search, "heuristic_partition", lambda problem, seconds: worst_start(problem))
    monkeypatch.setattr(local_search, "improve_partition", lambda problem, groups, seconds: groups)
    for seed in range(3):
        affinity = random_symmetric(9, seed)
        best = best_partition(affinity, objective=objective, **constraints).score
        with monkeypatch.context() as patch:
            patch.setattr(partition, "MOST_BY_SUBSETS", 0)
            for seconds in (1, 4, 8, 100):
                patch.setattr(integer_program, "time", CountingClock())
                patch.setattr(partition, "time", CountingClock())
                found = best_partition(affinity, objective=objective, time_limit_s=seconds, **constraints)
                assert found.bound >= best - 1e-6 and found.score <= best + 1e-9 and np.isfinite(found.bound)
                assert found.is_optimal == (found.bound == found.score)
                if found.is_optimal:
                    assert found.score == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tasks_that_must_be_together_and_cost_may_be_better_off_with_others(objective):
    """In a larger group a pair that costs may count less, so that components must not be searched apart."""
    affinity = np.array([[0, -10.0, -0.1, 1.0], [-10.0, 0, -0.1, -0.1], [-0.1, -0.1, 0, -0.1], [1.0, -0.1, -0.1, 0]])
    expected = best_by_plain_enumeration(affinity, objective, must_link=[[0, 1]])
    problem = made_problem(affinity, objective, must_link=[[0, 1]])
    assert problem.task_groups(by_components(problem)) == expected[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 3}, {"must_link": [[0, 8], [3, 4]], "cannot_link": [[1, 2, 5]]}]
)
def test_nine_tasks(objective, constraints):
    affinity = random_symmetric(9, seed=3)
    groups, score, num_candidates = best_by_plain_enumeration(affinity, objective, **constraints)
    found = best_partition(affinity, objective=objective, **constraints)
    assert (found.groups, found.num_candidates) == (groups, num_candidates)
    assert found.score == pytest.approx(score, abs=1e-11)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.sampled_from(OBJECTIVES))
def test_renumbering_tasks_renumbers_groups(num_tasks, seed, objective):
    affinity = random_symmetric(num_tasks, seed)  # generic values: no ties
    permutation = np.random.default_rng(seed + 1).permutation(num_tasks)
    original = best_partition(affinity, objective=objective)
    renumbered = best_partition(affinity[np.ix_(permutation, permutation)], objective=objective)
    translated = {frozenset(int(permutation[task]) for task in group) for group in renumbered.groups}
    assert translated == {frozenset(group) for group in original.groups}
    assert renumbered.score == pytest.approx(original.score, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from(OBJECTIVES))
def test_renumbering_tasks_keeps_score_under_ties(num_tasks, seed, objective):
    rng = np.random.default_rng(seed)
    affinity = np.tril(rng.integers(-1, 2, size=(num_tasks, num_tasks)))
    affinity = affinity + affinity.T
    permutation = rng.permutation(num_tasks)
    original = best_partition(affinity, objective=objective)
    renumbered = best_partition(affinity[np.ix_(permutation, permutation)], objective=objective)
    assert renumbered.score == pytest.approx(original.score, abs=1e-12)
    assert len(renumbered.groups) == len(original.groups)


def test_under_mean_groups_of_four_are_never_needed():
    for seed in range(30):
        affinity = random_symmetric(8, seed)
        assert max(map(len, best_partition(affinity, objective="mean").groups)) <= 3
        assert max(map(len, best_partition(affinity, objective="mean", min_size=2).groups)) <= 3
        assert max(map(len, best_partition(affinity, objective="mean", min_size=3).groups)) <= 5


# --- ties and scores by hand ----------------------------------------------------------------------------


WAY = "dynamic programming over subsets"


def test_objectives_on_a_case_worked_by_hand():
    affinity = np.array([[9.0, 2.0, -1.0], [2.0, 9.0, 0.5], [-1.0, 0.5, 9.0]])
    # {0,1,2}: sum 2 - 1 + 0.5 = 1.5; {0,1},{2}: sum 2, mean 2 + 2 + 0, density 2 / 2 + 0.
    pair = ((0, 1), (2,))
    assert best_partition(affinity) == Partition(pair, 2.0, 5, WAY, 2.0)
    assert best_partition(affinity, objective="mean") == Partition(pair, 4.0, 5, WAY, 4.0)
    assert best_partition(affinity, objective="density") == Partition(pair, 1.0, 5, WAY, 1.0)
    assert best_partition(affinity, num_groups=1) == Partition(((0, 1, 2),), 1.5, 1, WAY, 1.5)
    assert best_partition(affinity, must_link=[[0, 2]]).groups == ((0, 1, 2),)
    assert best_partition(affinity, cannot_link=[[0, 1]]).groups == ((0,), (1, 2))


def test_one_task_is_one_group():
    assert best_partition(np.array([[3.0]])) == Partition(((0,),), 0.0, 1, WAY, 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_identical_tasks_are_one_group(objective):
    gradient = np.random.default_rng(0).normal(size=20)
    assert best_partition(np.full((2, 2), gradient @ gradient), objective=objective).groups == ((0, 1),)


def test_identical_tasks_stay_together_among_others():
    for seed in range(40):
        gradients = np.random.default_rng(seed).normal(size=(7, 10))
        gradients[5] = gradients[1]
        (group,) = [group for group in best_partition(gradients @ gradients.T).groups if 1 in group]
        assert 5 in group


def test_ties_prefer_fewer_groups_and_then_tuple_order():
    zeros = np.zeros((4, 4))
    assert best_partition(zeros).groups == ((0, 1, 2, 3),)
    assert best_partition(zeros, num_groups=2).groups == ((0,), (1, 2, 3))
    assert best_partition(zeros, num_groups=2, min_size=2).groups == ((0, 1), (2, 3))
    assert best_partition(zeros, num_groups=2, must_link=[[0, 3]]).groups == ((0, 1, 3), (2,))
    ring = np.zeros((4, 4))  # 0-1-2-3-0: two equal perfect matchings
    for task in range(4):
        ring[task, (task + 1) % 4] = ring[(task + 1) % 4, task] = 1.0
    assert best_partition(ring, num_groups=2, max_size=2).groups == ((0, 1), (2, 3))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rounding_does_not_break_ties(objective):
    # Integers add exactly; tenths do not (0.1 + 0.2 - 0.3 is not 0), and must be grouped alike.
    rng = np.random.default_rng(0)
    for _ in range(300):
        integers = np.tril(rng.integers(-3, 4, size=(6, 6)))
        integers = integers + integers.T
        exact = best_partition(integers, objective=objective)
        assert best_partition(integers * 0.1, objective=objective).groups == exact.groups


def test_real_differences_are_not_ties():
    affinity = np.ones((3, 3))
    affinity[0, 2] = affinity[2, 0] = -1.0
    assert best_partition(affinity).groups == ((0, 1, 2),)  # equal to ((0, 1), (2,)) and ((0,), (1, 2))
    affinity[1, 2] = affinity[2, 1] = 1 - 1e-9
    assert best_partition(affinity).groups == ((0, 1), (2,))


@pytest.mark.parametrize("num_tasks", range(1, len(BELL_NUMBERS)))
def test_unconstrained_search_ranges_over_bell_number_of_partitions(num_tasks):
    assert best_partition(random_symmetric(num_tasks, 0)).num_candidates == BELL_NUMBERS[num_tasks]


def test_rounding_asymmetry_is_accepted_and_the_diagonal_ignored():
    affinity = random_symmetric(6, 7)
    skewed = affinity.copy()
    skewed[0, 1] += 1e-13
    np.fill_diagonal(skewed, 1e3)
    assert best_partition(skewed).groups == best_partition(affinity).groups


# --- many tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("constraints", [{}, {"num_groups": 4}])
def test_twelve_tasks_by_subsets_and_by_the_integer_program(objective, constraints):
    affinity = random_symmetric(12, 8)
    found = best_partition(affinity, objective=objective, **constraints)
    problem = made_problem(affinity, objective, **constraints)
    groups, bound = IntegerProgram(problem).solve(worst_start(problem), 60)
    assert problem.score(groups) == pytest.approx(found.score, abs=1e-5)
    assert bound == problem.score(groups)


@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_forty_tasks_with_proof(objective):
    affinity = clustered(40, 5, noise=2.0, seed=1)
    found = best_partition(affinity, objective=objective)
    assert found.is_optimal and found.method == "integer program"
    for seed in range(20):  # no neighbor scores more
        moved = [list(group) for group in found.groups]
        rng = np.random.default_rng(seed)
        left, joined = rng.choice(len(moved), 2, replace=False)
        moved[joined].append(moved[left].pop())
        assert plain_score(affinity, [group for group in moved if group], objective) <= found.score + 1e-9


def test_planted_groups_are_found_in_components():
    planted = np.arange(60) % 6
    affinity = np.where(planted[:, None] == planted[None, :], 1.0, -1.0) + 0.1 * random_symmetric(60, 5)
    for objective in ("sum", "density"):
        found = best_partition(affinity, objective=objective)
        assert found.groups == tuple(tuple(range(first, 60, 6)) for first in range(6))
        assert found.is_optimal and found.method == "6 connected components, by dynamic programming over subsets"


@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 6, "max_size": 9, "must_link": [[0, 30]], "cannot_link": [[1, 2]]}]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_out_of_time_is_said_and_bounded(objective, constraints):
    affinity = random_symmetric(40, 2)
    found = best_partition(affinity, objective=objective, time_limit_s=1, **constraints)
    assert meets_constraints(found.groups, **constraints)
    assert found.score == pytest.approx(plain_score(affinity, found.groups, objective))
    assert found.bound >= found.score
    if objective != "mean" or constraints:  # without them groups of up to three are enough
        assert not found.is_optimal
    assert np.isfinite(found.bound)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 6}, "num_groups=6 is impossible for 5 tasks; choose 1 to 5"),
        ({"num_groups": 0}, "num_groups=0 is impossible for 5 tasks; choose 1 to 5"),
        ({"min_size": 6}, "min_size=6 is impossible for 5 tasks"),
        ({"min_size": 0}, "min_size=0 is impossible"),
        ({"max_size": 0}, "max_size=0 is impossible"),
        ({"min_size": 3, "max_size": 2}, "min_size=3 is larger than max_size=2"),
        ({"min_size": 2, "max_size": 2}, "5 tasks cannot be split .* min_size=1 or max_size=3 would do"),
        ({"min_size": 3, "max_size": 4}, "5 tasks cannot be split .* min_size=2 or max_size=5 would do"),
        ({"num_groups": 3, "min_size": 2}, "num_groups=3 is impossible .*min_size=2; possible: 1 to 2"),
        ({"num_groups": 2, "max_size": 2}, "num_groups=2 .*min_size=1 and max_size=2; possible: 3 to 5"),
        ({"num_groups": 1, "min_size": 2, "max_size": 3}, "possible: only 2"),
        ({"must_link": [["a", "f"]]}, r"must_link: \[a, f\]: 'f' is not a task; tasks: a, b, c, d, e"),
        ({"cannot_link": [["a"]]}, r"cannot_link: \[a\] must name at least two tasks"),
        ({"cannot_link": [["a", "b", "a"]]}, r"cannot_link: \[a, b, a\] names a task twice"),
        (
            {"must_link": [["a", "b"], ["b", "c"]], "cannot_link": [["d", "c", "a"]]},
            "'a' and 'c' must be together .* apart",
        ),
        ({"must_link": [["a", "b", "c"]], "max_size": 2}, "max_size=2, but the 3 tasks 'a', 'b', 'c' must be together"),
        (
            {"num_groups": 2, "cannot_link": [["a", "b", "c"]]},
            "num_groups, apart at once; without num_groups or without apar",
        ),
        ({"num_groups": 4, "must_link": [["a", "b", "c"]]}, "without num_groups or without must_link there are some"),
        ({"min_size": 2, "cannot_link": [["a", "b", "c"]]}, "meets cannot_link, min_size at once"),
    ],
)
def test_impossible_constraints(options, message):
    with pytest.raises(UserError, match=message):
        check_constraints("abcde", **options)
    with pytest.raises(UserError, match=message):
        best_partition(np.zeros((5, 5)), tasks="abcde", **options)


def test_matrix_and_objective_errors():
    with pytest.raises(UserError, match=r"shape \(2, 3\), expected a square"):
        best_partition(np.zeros((2, 3)))
    with pytest.raises(UserError, match=r"shape \(0, 0\)"):
        best_partition(np.zeros((0, 0)))
    with pytest.raises(UserError, match=r"not symmetric: \[0, 1\] is 1 but \[1, 0\] is 0"):
        best_partition(np.array([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match=r"affinity\[1, 1\] is nan"):
        best_partition(np.diag([0.0, np.nan]))
    with pytest.raises(UserError, match="objective 'max' is unknown; choose from sum, mean, density"):
        best_partition(np.zeros((2, 2)), objective="max")
