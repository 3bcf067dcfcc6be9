"""Task grouping against slow references: explicit loops for affinities, plain enumeration for partitions."""

import io
import time
import warnings
from collections.abc import Iterator

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib._pylab_helpers import Gcf

from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import MAX_TASKS, Partition, best_partition, warnings_about
from pipeline.report.grouping_figures import affinity_graph_picture, affinity_heat_map

BELL_NUMBERS = [1, 1, 2, 5, 15, 52, 203, 877, 4140, 21147, 115975, 678570, 4213597]


# --- the slow reference ---------------------------------------------------------------------------------


def all_partitions(num_tasks: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every partition once, by enumerating restricted growth strings."""

    def extend(labels: list[int]) -> Iterator[list[int]]:
        if len(labels) == num_tasks:
            yield labels
            return
        for label in range(max(labels, default=-1) + 2):
            yield from extend([*labels, label])

    for labels in extend([]):
        yield tuple(
            tuple(task for task in range(num_tasks) if labels[task] == group) for group in range(max(labels) + 1)
        )


def slow_score(affinity: np.ndarray, groups, objective: str) -> float:
    total = 0.0
    for group in groups:
        if objective == "sum":
            for i in group:
                for j in group:
                    if i < j:
                        total += affinity[i, j]
        else:
            for i in group:
                others = [affinity[i, j] for j in group if j != i]
                if others:
                    total += sum(others) / len(others)
    return total


def slow_best(affinity, objective, num_groups=None, min_size=1, max_size=None) -> Partition | None:
    num_tasks = len(affinity)
    allowed = [
        (slow_score(affinity, groups, objective), groups)
        for groups in all_partitions(num_tasks)
        if num_groups in (None, len(groups))
        and all(min_size <= len(group) <= (max_size or num_tasks) for group in groups)
    ]
    if not allowed:
        return None
    scale = sum(abs(affinity[i, j]) for i in range(num_tasks) for j in range(i))
    best = max(score for score, _ in allowed)
    equals = [(score, groups) for score, groups in allowed if score >= best - 1e-12 * scale]
    score, groups = min(equals, key=lambda pair: (len(pair[1]), pair[1]))
    return Partition(groups, score, len(allowed))


def assert_same(found: Partition, expected: Partition, affinity: np.ndarray) -> None:
    assert found.groups == expected.groups
    assert found.num_candidates == expected.num_candidates
    assert found.score == pytest.approx(expected.score, rel=0, abs=1e-11 * max(1.0, np.abs(affinity).sum()))


def random_symmetric(num_tasks: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(num_tasks, num_tasks))
    return matrix + matrix.T


# --- affinity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_affinity_equals_explicit_loops(kind, dtype):
    gradients = np.random.default_rng(0).normal(size=(7, 5, 33)).astype(dtype)
    expected = np.zeros((5, 5))
    for snapshot in gradients.astype(np.float64):
        for i in range(5):
            for j in range(5):
                dot = sum(a * b for a, b in zip(snapshot[i], snapshot[j], strict=True))
                if kind == "cosine":
                    dot /= sum(a * a for a in snapshot[i]) ** 0.5 * sum(b * b for b in snapshot[j]) ** 0.5
                expected[i, j] += dot / len(gradients)
    affinity = affinity_matrix(gradients, kind)
    assert affinity.dtype == np.float64
    np.testing.assert_allclose(affinity, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(affinity, affinity.T)


def test_cosine_of_zero_gradient_is_zero_and_the_snapshot_counts():
    gradients = np.array([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(affinity_matrix(gradients, "cosine"), [[1.0, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e200])
def test_cosine_does_not_depend_on_the_size_of_gradients(size):
    gradients = np.random.default_rng(1).normal(size=(3, 4, 10))
    small = gradients.copy()
    small[:, 2] *= size
    np.testing.assert_allclose(affinity_matrix(small, "cosine"), affinity_matrix(gradients, "cosine"), atol=1e-14)


def test_affinity_errors_name_snapshot_and_task():
    gradients = np.ones((4, 3, 5))
    gradients[2, 1, :2] = [np.nan, np.inf]
    with pytest.raises(ValueError, match=r"snapshot 2, task 1 \('sketch'\): 2 of 5 gradient values"):
        affinity_matrix(gradients, "dot", tasks=["photo", "sketch", "quickdraw"])
    with pytest.raises(ValueError, match="snapshot 2, task 1: 2 of 5"):
        affinity_matrix(gradients, "cosine")


@pytest.mark.parametrize(
    ("gradients", "kind", "tasks", "message"),
    [
        (np.ones((0, 3, 5)), "dot", None, "no gradient snapshots"),
        (np.ones((3, 5)), "dot", None, r"shape \(3, 5\), expected \(snapshots, tasks, parameters\)"),
        (np.ones((3, 5, 0)), "dot", None, "no task or no parameter"),
        (np.ones((3, 5, 2)), "dot", ["a"], "1 task names for gradients of 5 tasks"),
        (np.ones((3, 5, 2)), "euclid", None, "'euclid' is unknown; choose from dot, cosine"),
    ],
)
def test_affinity_errors(gradients, kind, tasks, message):
    with pytest.raises(ValueError, match=message):
        affinity_matrix(gradients, kind, tasks=tasks)


# --- partition ------------------------------------------------------------------------------------------


@st.composite
def searches(draw):
    """A symmetric matrix, generic or with few distinct integer values (ties), and constraints."""
    num_tasks = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    matrix = draw(
        st.sampled_from(
            [
                rng.normal(size=(num_tasks, num_tasks)) * 10.0 ** draw(st.integers(-9, 9)),
                rng.integers(-1, 2, size=(num_tasks, num_tasks)).astype(float),
                rng.integers(0, 2, size=(num_tasks, num_tasks)) * 0.1,
                rng.integers(-3, 4, size=(num_tasks, num_tasks)) / 3.0,
            ]
        )
    )
    affinity = np.triu(matrix) + np.triu(matrix, 1).T
    min_size = draw(st.integers(1, min(3, num_tasks)))
    constraints = {
        "num_groups": draw(st.none() | st.integers(1, num_tasks)),
        "min_size": min_size,
        "max_size": draw(st.none() | st.integers(min_size, num_tasks + 1)),
    }
    return affinity, draw(st.sampled_from(["sum", "mean"])), constraints


@settings(max_examples=250, deadline=None)
@given(searches())
def test_partition_equals_enumeration(search):
    affinity, objective, constraints = search
    expected = slow_best(affinity, objective, **constraints)
    if expected is None:
        with pytest.raises(ValueError, match=r"impossible|cannot be split"):
            best_partition(affinity, objective=objective, **constraints)
    else:
        assert_same(best_partition(affinity, objective=objective, **constraints), expected, affinity)


@pytest.mark.parametrize("objective", ["sum", "mean"])
@pytest.mark.parametrize("num_groups", [None, 3])
def test_partition_equals_enumeration_for_nine_tasks(objective, num_groups):
    affinity = random_symmetric(9, seed=3)
    expected = slow_best(affinity, objective, num_groups)
    assert_same(best_partition(affinity, objective=objective, num_groups=num_groups), expected, affinity)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 7), st.integers(0, 2**32 - 1), st.sampled_from(["sum", "mean"]))
def test_renumbering_tasks_renumbers_groups(num_tasks, seed, objective):
    affinity = random_symmetric(num_tasks, seed)  # generic values: no ties
    permutation = np.random.default_rng(seed + 1).permutation(num_tasks)
    original = best_partition(affinity, objective=objective)
    renumbered = best_partition(affinity[np.ix_(permutation, permutation)], objective=objective)
    translated = {frozenset(int(permutation[task]) for task in group) for group in renumbered.groups}
    assert translated == {frozenset(group) for group in original.groups}
    assert renumbered.score == pytest.approx(original.score, rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.sampled_from(["sum", "mean"]))
def test_renumbering_tasks_keeps_score_under_ties(num_tasks, seed, objective):
    rng = np.random.default_rng(seed)
    affinity = np.tril(rng.integers(-1, 2, size=(num_tasks, num_tasks)))
    affinity = affinity + affinity.T
    permutation = rng.permutation(num_tasks)
    original = best_partition(affinity, objective=objective)
    renumbered = best_partition(affinity[np.ix_(permutation, permutation)], objective=objective)
    assert renumbered.score == pytest.approx(original.score, abs=1e-12)
    assert len(renumbered.groups) == len(original.groups)


def test_objectives_on_a_case_worked_by_hand():
    affinity = np.array([[9.0, 2.0, -1.0], [2.0, 9.0, 0.5], [-1.0, 0.5, 9.0]])
    # {0,1,2}: sum 2 - 1 + 0.5 = 1.5; {0,1},{2}: sum 2, mean 2 + 2 + 0.
    assert best_partition(affinity) == Partition(((0, 1), (2,)), 2.0, 5)
    assert best_partition(affinity, objective="mean") == Partition(((0, 1), (2,)), 4.0, 5)
    assert best_partition(affinity, num_groups=1) == Partition(((0, 1, 2),), 1.5, 1)
    assert best_partition(np.array([[3.0]])) == Partition(((0,),), 0.0, 1)


def test_ties_prefer_fewer_groups_and_then_tuple_order():
    zeros = np.zeros((4, 4))
    assert best_partition(zeros).groups == ((0, 1, 2, 3),)
    assert best_partition(zeros, num_groups=2).groups == ((0,), (1, 2, 3))
    assert best_partition(zeros, num_groups=2, min_size=2).groups == ((0, 1), (2, 3))
    ring = np.zeros((4, 4))  # 0-1-2-3-0: two equal perfect matchings
    for task in range(4):
        ring[task, (task + 1) % 4] = ring[(task + 1) % 4, task] = 1.0
    assert best_partition(ring, num_groups=2, max_size=2).groups == ((0, 1), (2, 3))


@pytest.mark.parametrize("objective", ["sum", "mean"])
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


def test_largest_search_finishes_and_beats_the_planted_grouping():
    num_tasks = 16
    planted = np.arange(num_tasks) % 4
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(num_tasks, num_tasks)) * 0.1
    affinity = np.where(planted[:, None] == planted[None, :], 1.0, -1.0) + noise + noise.T
    start = time.perf_counter()
    partition = best_partition(affinity)
    assert time.perf_counter() - start < 10
    assert partition.groups == tuple(tuple(range(first, num_tasks, 4)) for first in range(4))
    assert partition.num_candidates == 10_480_142_147
    assert partition.score == pytest.approx(slow_score(affinity, partition.groups, "sum"))


def test_rounding_asymmetry_is_accepted_and_the_diagonal_ignored():
    affinity = random_symmetric(6, 7)
    skewed = affinity.copy()
    skewed[0, 1] += 1e-13
    np.fill_diagonal(skewed, 1e3)
    assert best_partition(skewed).groups == best_partition(affinity).groups


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
        ({"objective": "max"}, "objective 'max' is unknown; choose from sum, mean"),
    ],
)
def test_impossible_requests(options, message):
    with pytest.raises(ValueError, match=message):
        best_partition(np.zeros((5, 5)), **options)


def test_matrix_errors():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected a square"):
        best_partition(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \(0, 0\)"):
        best_partition(np.zeros((0, 0)))
    with pytest.raises(ValueError, match=r"not symmetric: \[0, 1\] is 1 but \[1, 0\] is 0"):
        best_partition(np.array([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"affinity\[1, 1\] is nan"):
        best_partition(np.diag([0.0, np.nan]))
    too_many = MAX_TASKS + 1
    with pytest.raises(ValueError, match=f"{too_many} tasks are too many.*MAX_TASKS={MAX_TASKS}"):
        best_partition(np.zeros((too_many, too_many)))


# --- warnings -------------------------------------------------------------------------------------------


def warned(affinity, *, objective="sum", kind="dot", **constraints) -> list[str]:
    names = [f"task{index}" for index in range(len(affinity))]
    partition = best_partition(affinity, objective=objective, **constraints)
    return warnings_about(affinity, partition, names, objective=objective, kind=kind)


def test_collapse_into_one_group_says_what_to_do():
    affinity = np.ones((4, 4))
    (message,) = warned(affinity)
    assert "All 4 tasks are in one group: every pairwise affinity is positive" in message
    assert "'mean'" in message and "num_groups=2" in message and "'cosine'" in message
    (message,) = warned(affinity, objective="mean", kind="cosine")
    assert "'mean'" not in message and "'cosine'" not in message and "num_groups=2" in message
    assert warned(affinity, num_groups=1) == []  # asked for: no warning
    mixed = affinity.copy()
    mixed[0, 1] = mixed[1, 0] = -0.1
    (message,) = warned(mixed)
    assert "outweigh the negative" in message


def test_all_alone_all_zero_and_unremarkable():
    negative = 2 * np.eye(3) - 1
    (message,) = warned(negative)
    assert "Every task is alone: no pairwise affinity is positive" in message
    assert warned(negative, max_size=1) == []
    (message,) = warned(np.eye(3))
    assert "All affinities between tasks are zero" in message
    blocks = np.kron(np.eye(2), np.ones((2, 2))) * 2 - 1
    assert warned(blocks) == []


def test_dominant_and_missing_gradients_are_named():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 4, 50))
    gradients[:, 1] *= 5
    gradients[:, 3] = 0
    messages = "\n".join(warned(affinity_matrix(gradients, "dot")))
    assert "Task 'task1' has by far the largest gradients" in messages
    assert "zero in every snapshot: 'task3'" in messages
    assert "largest gradients" not in "\n".join(warned(affinity_matrix(gradients, "cosine"), kind="cosine"))


def test_warnings_check_the_number_of_names():
    partition = best_partition(np.eye(3))
    with pytest.raises(ValueError, match="2 task names for an affinity matrix of 3 tasks"):
        warnings_about(np.eye(3), partition, ["a", "b"], objective="sum", kind="dot")


# --- graph and figures ----------------------------------------------------------------------------------


def test_graph_holds_matrix_and_groups(tmp_path):
    affinity = random_symmetric(3, 0)
    graph = affinity_graph(affinity, ["a", "b", "c"], ((0, 2), (1,)))
    assert list(graph) == ["a", "b", "c"] and graph.number_of_edges() == 3
    assert graph.nodes["b"] == {"group": 1, "self_affinity": affinity[1, 1]}
    assert graph.edges["a", "c"] == {"weight": affinity[0, 2], "within_group": True}
    assert graph.edges["a", "b"] == {"weight": affinity[0, 1], "within_group": False}
    nx.write_graphml(graph, tmp_path / "graph.graphml")


@pytest.mark.parametrize(
    ("names", "groups", "message"),
    [
        (["a", "b"], ((0, 1, 2),), "2 task names"),
        (["a", "b", "a"], ((0, 1, 2),), "repeated: a"),
        (["a", "b", "c"], ((0, 1),), "exactly once"),
        (["a", "b", "c"], ((0, 1), (1, 2)), "exactly once"),
    ],
)
def test_graph_errors(names, groups, message):
    with pytest.raises(ValueError, match=message):
        affinity_graph(np.eye(3), names, groups)


@pytest.mark.parametrize(
    ("num_tasks", "num_groups", "size"),
    [(1, 1, 1.0), (3, 1, 1e-7), (3, 3, 0.0), (6, 2, 1e5), (14, 14, 1.0), (40, 7, 1.0)],
)
def test_figures_render_without_warnings_and_without_pyplot_state(num_tasks, num_groups, size):
    affinity = random_symmetric(num_tasks, 2) * size + np.eye(num_tasks) * size * 1e4
    names = [f"a $task_{index} with a rather long name" for index in range(num_tasks)]
    groups = [tuple(range(group, num_tasks, num_groups)) for group in range(num_groups)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            affinity_heat_map(affinity, names, groups),
            affinity_graph_picture(affinity_graph(affinity, names, groups)),
        ):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=40)
            assert picture.getvalue().startswith(b"\x89PNG")
    assert Gcf.get_all_fig_managers() == []


def test_heat_map_orders_by_group_and_keeps_the_diagonal_out_of_the_scale():
    affinity = np.array([[1e4, -1.0, 3.0], [-1.0, 2e4, 0.5], [3.0, 0.5, 3e4]])
    axes = affinity_heat_map(affinity, ["a", "b", "c"], ((0, 2), (1,))).axes[0]
    image = axes.get_images()[0]
    assert image.get_clim() == (-3.0, 3.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    np.testing.assert_array_equal(image.get_array().filled(0), [[0, 3, -1], [3, 0, 0.5], [-1, 0.5, 0]])
    assert {text.get_text() for text in axes.texts} == {"10000", "20000", "30000", "3.00", "−1.00", "0.50"}
    assert [(block.get_x(), block.get_width()) for block in axes.patches] == [(-0.5, 2), (1.5, 1)]


@pytest.mark.parametrize("num_tasks", [3, 6, 40])
def test_no_label_is_cut_off(num_tasks):
    affinity = random_symmetric(num_tasks, 4)
    names = [f"quickdraw, variant {index}" for index in range(num_tasks)]
    groups = [tuple(range(0, num_tasks, 2)), tuple(range(1, num_tasks, 2))]
    for figure in (
        affinity_heat_map(affinity, names, groups),
        affinity_graph_picture(affinity_graph(affinity, names, groups)),
    ):
        figure.savefig(io.BytesIO())  # runs the layout
        whole = figure.bbox
        needed = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert needed.x0 >= -1 and needed.y0 >= -1
        assert needed.x1 <= whole.x1 + 1 and needed.y1 <= whole.y1 + 1
