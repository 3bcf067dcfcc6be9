"""Every search algorithm against plain enumeration, and the messages of infeasible constraints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_partitions import OBJECTIVES, best_by_enumeration, meets_constraints, reference_score

from pipeline.errors import UserError
from pipeline.grouping import partition
from pipeline.grouping.objectives import OBJECTIVES as REGISTERED
from pipeline.grouping.objectives import get_objective
from pipeline.grouping.partition import Partition, best_partition
from pipeline.grouping.search import integer_program, local_search
from pipeline.grouping.search.assignment import feasible_labels
from pipeline.grouping.search.components import connected_components
from pipeline.grouping.search.constraints import check_constraints
from pipeline.grouping.search.integer_program import IntegerProgram
from pipeline.grouping.search.local_search import heuristic_partition, improve_partition
from pipeline.grouping.search.problem import Problem
from pipeline.grouping.search.subsets import solve_subset_dp

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
def searches(draw, max_tasks: int = 7):
    """A symmetric matrix, generic or with few distinct values (ties), an objective, and constraints."""
    num_tasks = draw(st.integers(1, max_tasks))
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


def make_problem(affinity: np.ndarray, objective: str, **constraints) -> Problem:
    return Problem.from_affinity(affinity, get_objective(objective), **constraints)


# --- all algorithms agree -------------------------------------------------------------------------------------


def solve_components(problem: Problem) -> list[tuple[int, ...]]:
    return [
        tuple(part[node] for node in group)
        for part in connected_components(problem)
        for group in solve_subset_dp(problem.contract([[node] for node in part]))
    ]


@settings(max_examples=400, deadline=None)
@given(searches())
def test_every_exact_algorithm_finds_the_partition_of_plain_enumeration(search):
    affinity, objective, constraints = search
    expected = best_by_enumeration(affinity, objective, **constraints)
    if expected is None:
        with pytest.raises(UserError, match=r"impossible|cannot be split|at the same time|must_link puts"):
            best_partition(affinity, objective=objective, **constraints)
        return
    groups, score, num_candidates = expected
    problem = make_problem(affinity, objective, **constraints)
    for solve in (solve_subset_dp, solve_components):
        assert problem.task_groups(solve(problem)) == groups, solve
    result = best_partition(affinity, objective=objective, **constraints)
    assert (result.groups, result.num_candidates, result.is_optimal) == (groups, num_candidates, True)
    assert result.score == pytest.approx(score, rel=0, abs=1e-11 * max(1.0, np.abs(affinity).sum()))


def worst_start(problem: Problem) -> list[tuple[int, ...]]:
    labels = feasible_labels(problem, 10)
    return [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]


@settings(max_examples=100, deadline=None)
@given(searches())
def test_the_integer_program_reaches_the_best_score(search):
    affinity, objective, constraints = search
    expected = best_by_enumeration(affinity, objective, **constraints)
    assume(expected is not None)
    problem = make_problem(affinity, objective, **constraints)
    assume(problem.num_nodes > 1)
    groups, upper_bound = IntegerProgram(problem).solve(worst_start(problem), 30)
    assert meets_constraints(problem.task_groups(groups), **constraints)
    assert problem.score(groups) == pytest.approx(expected[1], rel=0, abs=2e-6 * max(1e-9, np.abs(affinity).max()))
    assert upper_bound == problem.score(groups)


@settings(max_examples=60, deadline=None)
@given(searches(max_tasks=7), st.integers(4, 6))
def test_a_local_search_meets_the_constraints_and_claims_no_more_than_it_has(search, max_parts):
    """Rounds have few parts, as for many tasks."""
    affinity, objective, constraints = search
    expected = best_by_enumeration(affinity, objective, **constraints)
    assume(expected is not None)
    problem = make_problem(affinity, objective, **constraints)
    assume(problem.num_nodes > 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_search, "MAX_PARTS", max_parts)
        patch.setattr(local_search, "NUM_ANNEALINGS", 1)
        patch.setattr(local_search, "ROUNDS_PER_NODE", 4)
        start = heuristic_partition(problem, 5)
        groups = improve_partition(problem, start, 5)
    assert meets_constraints(problem.task_groups(groups), **constraints)
    assert problem.score(groups) >= problem.score(start) - problem.tie * problem.num_nodes
    assert problem.score(groups) <= expected[1] + 1e-11 * max(1.0, np.abs(affinity).sum())


class CountingClock:
    """Replaces the module `time`: the clock advances by a second per call, so a search ends after that many calls."""

    def __init__(self):
        self.num_calls = 0

    def monotonic(self) -> float:
        self.num_calls += 1
        return float(self.num_calls)


LOCAL_SEARCHES = {
    "no constraints": {},
    "number of groups": {"num_groups": 3},
    "sizes": {"min_size": 2, "max_size": 3},
    "equal sizes": {"min_size": 2, "max_size": 2},
    "must_link and cannot_link": {"must_link": [[0, 3], [1, 4]], "cannot_link": [[0, 1, 2]]},
}


@pytest.mark.parametrize("name", LOCAL_SEARCHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_local_search_solves_most_small_problems(monkeypatch, objective, name):
    """Rounds of five parts: the search has to pass through partitions that are not optimal."""
    monkeypatch.setattr(local_search, "MAX_PARTS", 5)
    monkeypatch.setattr(local_search, "NUM_ANNEALINGS", 2)
    monkeypatch.setattr(local_search, "ROUNDS_PER_NODE", 8)
    solved = 0
    for seed in range(4):
        problem = make_problem(random_symmetric(8, seed), objective, **LOCAL_SEARCHES[name])
        groups = improve_partition(problem, heuristic_partition(problem, 60), 60)
        solved += problem.score(groups) >= problem.score(solve_subset_dp(problem)) - 1e-9
    assert solved >= 3


def test_annealing_gets_out_of_local_optima(monkeypatch):
    monkeypatch.setattr(local_search, "MAX_PARTS", 7)
    monkeypatch.setattr(local_search, "NUM_ANNEALINGS", 1)
    gains = []
    for seed in range(3):
        problem = make_problem(random_symmetric(24, seed), "sum", num_groups=4)
        start = heuristic_partition(problem, 60)
        gains.append(problem.score(improve_partition(problem, start, 60)) - problem.score(start))
    assert max(gains) > 0.1


@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 3}, {"max_size": 3, "must_link": [[0, 1]], "cannot_link": [[2, 3]]}]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_upper_bounds_of_stopped_searches_are_never_below_the_optimum(monkeypatch, objective, constraints):
    """The integer program on small problems, stopped after any number of rounds."""
    gaps = []
    for seed in range(4):
        problem = make_problem(random_symmetric(9, seed), objective, **constraints)
        best = problem.score(solve_subset_dp(problem))
        positive = np.clip(np.triu(random_symmetric(9, seed), 1), 0, None).sum()
        trivial_bound = positive * REGISTERED[objective].pair_weight(2)  # if no negative pair had to be joined
        for seconds in (1, 2, 3, 4, 6, 10, 100):
            monkeypatch.setattr(integer_program, "time", CountingClock())
            groups, upper_bound = IntegerProgram(problem).solve(worst_start(problem), seconds)
            assert problem.score(groups) <= best + 1e-9 and upper_bound >= best - 1e-6
            assert upper_bound <= trivial_bound + 1e-6
            gaps.append(upper_bound - problem.score(groups))
    assert min(gaps) == 0 and max(gaps) > 0  # with and without proof


@pytest.mark.parametrize("constraints", [{}, {"num_groups": 3}, {"must_link": [[0, 1]], "cannot_link": [[2, 3]]}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_partition_without_proof_has_an_upper_bound_above_the_optimum(monkeypatch, objective, constraints):
    """`best_partition` takes the path for many tasks on few, whose optimum is known."""
    monkeypatch.setattr(local_search, "heuristic_partition", lambda problem, seconds: worst_start(problem))
    monkeypatch.setattr(local_search, "improve_partition", lambda problem, groups, seconds: groups)
    for seed in range(3):
        affinity = random_symmetric(9, seed)
        best = best_partition(affinity, objective=objective, **constraints).score
        with monkeypatch.context() as patch:
            patch.setattr(partition, "MAX_NODES_SUBSET_DP", 0)
            for seconds in (1, 4, 8, 100):
                patch.setattr(integer_program, "time", CountingClock())
                patch.setattr(partition, "time", CountingClock())
                result = best_partition(affinity, objective=objective, time_limit_s=seconds, **constraints)
                assert (
                    result.upper_bound >= best - 1e-6
                    and result.score <= best + 1e-9
                    and np.isfinite(result.upper_bound)
                )
                assert result.is_optimal == (result.upper_bound == result.score)
                if result.is_optimal:
                    assert result.score == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_linked_tasks_with_negative_affinity_may_be_better_off_in_a_larger_group(objective):
    """A negative pair may count less in a larger group: components must not be searched separately."""
    affinity = np.array([[0, -10.0, -0.1, 1.0], [-10.0, 0, -0.1, -0.1], [-0.1, -0.1, 0, -0.1], [1.0, -0.1, -0.1, 0]])
    expected = best_by_enumeration(affinity, objective, must_link=[[0, 1]])
    problem = make_problem(affinity, objective, must_link=[[0, 1]])
    assert problem.task_groups(solve_components(problem)) == expected[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 3}, {"must_link": [[0, 8], [3, 4]], "cannot_link": [[1, 2, 5]]}]
)
def test_nine_tasks(objective, constraints):
    affinity = random_symmetric(9, seed=3)
    groups, score, num_candidates = best_by_enumeration(affinity, objective, **constraints)
    result = best_partition(affinity, objective=objective, **constraints)
    assert (result.groups, result.num_candidates) == (groups, num_candidates)
    assert result.score == pytest.approx(score, abs=1e-11)


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


METHOD = "dynamic programming over subsets"


def test_objectives_on_a_case_worked_by_hand():
    affinity = np.array([[9.0, 2.0, -1.0], [2.0, 9.0, 0.5], [-1.0, 0.5, 9.0]])
    # {0,1,2}: sum 2 - 1 + 0.5 = 1.5; {0,1},{2}: sum 2, mean 2 + 2 + 0, density 2 / 2 + 0.
    pair = ((0, 1), (2,))
    assert best_partition(affinity) == Partition(pair, 2.0, 5, METHOD, 2.0)
    assert best_partition(affinity, objective="mean") == Partition(pair, 4.0, 5, METHOD, 4.0)
    assert best_partition(affinity, objective="density") == Partition(pair, 1.0, 5, METHOD, 1.0)
    assert best_partition(affinity, num_groups=1) == Partition(((0, 1, 2),), 1.5, 1, METHOD, 1.5)
    assert best_partition(affinity, must_link=[[0, 2]]).groups == ((0, 1, 2),)
    assert best_partition(affinity, cannot_link=[[0, 1]]).groups == ((0,), (1, 2))


def test_one_task_is_one_group():
    assert best_partition(np.array([[3.0]])) == Partition(((0,),), 0.0, 1, METHOD, 0.0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_identical_tasks_are_one_group(objective):
    gradient = np.random.default_rng(0).normal(size=20)
    assert best_partition(np.full((2, 2), gradient @ gradient), objective=objective).groups == ((0, 1),)


def test_identical_tasks_share_a_group_among_other_tasks():
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
    result = best_partition(affinity, objective=objective, **constraints)
    problem = make_problem(affinity, objective, **constraints)
    groups, upper_bound = IntegerProgram(problem).solve(worst_start(problem), 60)
    assert problem.score(groups) == pytest.approx(result.score, abs=1e-5)
    assert upper_bound == problem.score(groups)


@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_forty_tasks_with_proof(objective):
    affinity = clustered(40, 5, noise=2.0, seed=1)
    result = best_partition(affinity, objective=objective)
    assert result.is_optimal and result.method == "integer program"
    for seed in range(20):  # no neighbor scores more
        moved = [list(group) for group in result.groups]
        rng = np.random.default_rng(seed)
        source, target = rng.choice(len(moved), 2, replace=False)
        moved[target].append(moved[source].pop())
        assert reference_score(affinity, [group for group in moved if group], objective) <= result.score + 1e-9


def test_planted_groups_are_found_in_components():
    planted = np.arange(60) % 6
    affinity = np.where(planted[:, None] == planted[None, :], 1.0, -1.0) + 0.1 * random_symmetric(60, 5)
    for objective in ("sum", "density"):
        result = best_partition(affinity, objective=objective)
        assert result.groups == tuple(tuple(range(group, 60, 6)) for group in range(6))
        assert result.is_optimal and result.method == "6 connected components, by dynamic programming over subsets"


@pytest.mark.parametrize(
    "constraints", [{}, {"num_groups": 6, "max_size": 9, "must_link": [[0, 30]], "cannot_link": [[1, 2]]}]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_search_at_the_time_limit_has_an_upper_bound(objective, constraints):
    affinity = random_symmetric(40, 2)
    result = best_partition(affinity, objective=objective, time_limit_s=0.3, **constraints)
    assert meets_constraints(result.groups, **constraints)
    assert result.score == pytest.approx(reference_score(affinity, result.groups, objective))
    assert result.upper_bound >= result.score
    if objective != "mean" or constraints:  # without them groups of up to three are enough
        assert not result.is_optimal
    assert np.isfinite(result.upper_bound)


# --- infeasible constraints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 6}, "num_groups=6 is impossible for 5 tasks; choose 1 to 5"),
        ({"num_groups": 0}, "num_groups=0 is impossible for 5 tasks; choose 1 to 5"),
        ({"min_size": 6}, "min_size=6 is impossible for 5 tasks"),
        ({"min_size": 0}, "min_size=0 is impossible"),
        ({"max_size": 0}, "max_size=0 is impossible"),
        ({"min_size": 3, "max_size": 2}, "min_size=3 is larger than max_size=2"),
        ({"min_size": 2, "max_size": 2}, "5 tasks cannot be split .* choose min_size=1 or max_size=3"),
        ({"min_size": 3, "max_size": 4}, "5 tasks cannot be split .* choose min_size=2 or max_size=5"),
        ({"num_groups": 3, "min_size": 2}, "num_groups=3 is impossible .*min_size=2; possible: 1 to 2"),
        ({"num_groups": 2, "max_size": 2}, "num_groups=2 .*min_size=1 and max_size=2; possible: 3 to 5"),
        ({"num_groups": 1, "min_size": 2, "max_size": 3}, "possible: only 2"),
        ({"must_link": [["a", "f"]]}, r"must_link: \[a, f\]: 'f' is not a task; tasks: a, b, c, d, e"),
        ({"cannot_link": [["a"]]}, r"cannot_link: \[a\] must name at least two tasks"),
        ({"cannot_link": [["a", "b", "a"]]}, r"cannot_link: \[a, b, a\] names a task twice"),
        (
            {"must_link": [["a", "b"], ["b", "c"]], "cannot_link": [["d", "c", "a"]]},
            "must_link puts 'a' and 'c' in one group, cannot_link forbids it",
        ),
        (
            {"must_link": [["a", "b", "c"]], "max_size": 2},
            "max_size=2, but must_link puts the 3 tasks 'a', 'b', 'c' in",
        ),
        (
            {"num_groups": 2, "cannot_link": [["a", "b", "c"]]},
            "num_groups, cannot_link at the same time; remove num_groups or cannot_link",
        ),
        ({"num_groups": 4, "must_link": [["a", "b", "c"]]}, "at the same time; remove num_groups or must_link"),
        ({"min_size": 2, "cannot_link": [["a", "b", "c"]]}, "meets cannot_link, min_size at the same time"),
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
