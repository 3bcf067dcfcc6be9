"""Affinities against explicit loops, the grouping stage on made-up snapshots, its advice and its pictures."""

import io
import json
import sys
import warnings

import networkx as nx
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from small_clip import small_towers
from small_problem import mmap_shape

from pipeline.command_line import run_job
from pipeline.config import GroupingConfig
from pipeline.errors import UserError
from pipeline.grouping.advice import warnings_about
from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.gradient_blocks import SOURCE, gradient_blocks, read_layout
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.partition import Partition, best_partition
from pipeline.methods.mmap import SharedMmap
from pipeline.report.grouping_figures import affinity_graph_picture, affinity_heat_map
from pipeline.stages.grouping import describe_search
from pipeline.stages.grouping_solution import write_grouping
from pipeline.training.loop import Snapshot, StepRecord
from pipeline.training.snapshots import write_snapshots


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


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_affinity_of_blocks_is_the_mean_of_their_own(kind):
    gradients = np.random.default_rng(3).normal(size=(4, 3, 10))
    blocks = [np.array([0, 1, 2]), np.array([5, 9]), np.array([3, 4])]
    expected = np.mean([affinity_matrix(gradients[:, :, block], kind) for block in blocks], axis=0)
    np.testing.assert_allclose(affinity_matrix(gradients, kind, blocks=blocks), expected, atol=1e-14)
    whole = affinity_matrix(gradients, kind, blocks=[np.arange(10)])
    np.testing.assert_array_equal(whole, affinity_matrix(gradients, kind))


def test_the_global_prompts_layout_has_the_source():
    prompt = SharedMmap(mmap_shape(small_towers()[0]), ["ink"], seed=1)
    assert list(prompt.gradient_layout()) == [SOURCE, "text_scaling", "vision_scaling"]


LAYOUT = {"source": [3, 2, 2], "text_scaling": [3, 1, 1], "vision_scaling": [3, 1, 2]}


def test_gradient_blocks_follow_the_layout():
    (whole,) = gradient_blocks(LAYOUT)
    np.testing.assert_array_equal(whole, np.arange(21))
    (source,) = gradient_blocks(LAYOUT, scaling_matrices=False)
    np.testing.assert_array_equal(source, np.arange(12))
    layers = gradient_blocks(LAYOUT, per_layer=True)
    assert [layer.tolist() for layer in layers] == [
        [0, 1, 2, 3, 12, 15, 16],
        [4, 5, 6, 7, 13, 17, 18],
        [8, 9, 10, 11, 14, 19, 20],
    ]
    layers = gradient_blocks(LAYOUT, per_layer=True, scaling_matrices=False)
    assert [layer.tolist() for layer in layers] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_source_shared_by_all_layers_is_a_block_of_its_own():
    layout = {"source": [1, 2, 1], "text_scaling": [3, 1, 1], "vision_scaling": [3, 1, 1]}
    blocks = gradient_blocks(layout, per_layer=True)
    assert [block.tolist() for block in blocks] == [[0, 1], [2, 5], [3, 6], [4, 7]]
    assert len(gradient_blocks(layout, per_layer=True, scaling_matrices=False)) == 1


def test_per_layer_dot_products_group_as_the_whole_ones():
    gradients = np.random.default_rng(4).normal(size=(5, 4, 21))
    whole = affinity_matrix(gradients, "dot")
    np.testing.assert_allclose(
        affinity_matrix(gradients, "dot", blocks=gradient_blocks(LAYOUT, per_layer=True)), whole / 3
    )


# --- the stage --------------------------------------------------------------------------------------------

TASKS = ["ink", "chalk", "neon"]


def solved(tmp_path, gradients: np.ndarray, **options) -> dict:
    """grouping.json of the stage, given snapshots (S, T, 21)."""
    file = tmp_path / "snapshots.parquet"
    records = [StepRecord(step, 1, 0.1, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)) for step in range(1, len(gradients) + 1)]
    values = torch.tensor(gradients, dtype=torch.float32)
    write_snapshots(file, TASKS, [Snapshot(*taken, torch.zeros(21)) for taken in zip(records, values)], LAYOUT)
    write_grouping(TASKS, {file: TASKS}, GroupingConfig(**options), tmp_path)
    return json.loads((tmp_path / "grouping.json").read_text())


def test_the_stage_heeds_its_options_and_records_them(tmp_path):
    gradients = np.zeros((2, 3, 21))
    gradients[:, :, :4] = np.array([1.0, 1.0, -1.0])[:, None]  # layer 1 of the source: ink and chalk
    gradients[:, :, 4:12] = np.array([0.1, -0.1, -0.1])[:, None]  # its other layers: chalk and neon, but short
    gradients[:, :, 12:] = np.array([3.0, -3.0, 3.0])[:, None]  # the scaling matrices: ink and neon
    found = solved(tmp_path, gradients)
    assert found["groups"] == [["ink", "neon"], ["chalk"]]
    assert (found["method"], found["proven"], found["num_candidates"]) == ("enumeration", True, 5)
    assert found["bound"] == found["score"] > 0
    found = solved(tmp_path, gradients, scaling_matrices=False, objective="density")
    assert found["groups"] == [["ink", "chalk"], ["neon"]]
    assert (found["scaling_matrices"], found["per_layer"], found["objective"]) == (False, False, "density")
    found = solved(tmp_path, gradients, scaling_matrices=False, per_layer=True, affinity="cosine")
    assert found["groups"] == [["ink"], ["chalk", "neon"]]
    found = solved(tmp_path, gradients, together=[["ink", "chalk"]], apart=[["neon", "ink"]])
    assert found["groups"] == [["ink", "chalk"], ["neon"]]
    assert found["constraints"]["together"] == [["ink", "chalk"]] and found["num_candidates"] == 1
    assert describe_search(found) == "best of 1 partitions · enumeration"


def test_how_a_search_is_told():
    result = {"num_candidates": None, "proven": False, "method": "integer program (clique partitioning)"}
    assert describe_search(result) == "best found · integer program (clique partitioning)"
    assert describe_search(result | {"num_candidates": 10**20, "proven": True}).startswith("best of 1.0e+20 partitions")


def test_bad_snapshots_are_named(tmp_path):
    gradients = np.ones((3, 3, 21))
    gradients[1, 2, 5] = np.nan
    with pytest.raises(UserError, match=r"snapshot 1, task 2 \('neon'\): 1 of 21 .* lower training.learning_rate"):
        solved(tmp_path, gradients)
    with pytest.raises(UserError, match="holds no snapshot; .* with a smaller global_prompt.snapshot_every"):
        solved(tmp_path, np.ones((0, 3, 21)))
    with pytest.raises(UserError, match="no gradient snapshots; train the global prompt again"):
        read_layout(tmp_path / "nowhere.parquet")
    solved(tmp_path, np.ones((3, 3, 21)))
    tasks = [*TASKS, "oil"]
    with pytest.raises(UserError, match="step 1 lacks the tasks oil"):
        write_grouping(tasks, {tmp_path / "snapshots.parquet": tasks}, GroupingConfig(), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[[ink, oil]]", "apart: [ink, oil]: 'oil' is not a task; tasks: "),
        ("[[ink, chalk]]", "'chalk' and 'ink' must be together (`together`) and apart (`apart`)"),
    ],
)
def test_constraints_are_checked_at_the_door(tmp_path, monkeypatch, capsys, value, message):
    options = ["--grouping.together", "[[chalk, ink]]", "--grouping.apart", value]
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", "--storage", str(tmp_path / "storage"), *options])
    with pytest.raises(SystemExit) as end:
        run_job("", lambda run: pytest.fail("the job started"))
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().out.split())


# --- warnings -------------------------------------------------------------------------------------------


def warned(affinity, *, objective="sum", kind="dot", per_layer=False, **constraints) -> list[str]:
    names = [f"task{index}" for index in range(len(affinity))]
    partition = best_partition(affinity, objective=objective, **constraints)
    return warnings_about(affinity, partition, names, objective=objective, kind=kind, per_layer=per_layer)


def test_collapse_into_one_group_says_what_to_do():
    affinity = np.ones((4, 4))
    (message,) = warned(affinity)
    assert "All 4 tasks are in one group: every pairwise affinity is positive" in message
    assert "'mean'" in message and "'density'" in message and "num_groups=2" in message and "'cosine'" in message
    (message,) = warned(affinity, objective="mean", kind="cosine")
    assert "'mean'" not in message and "'cosine'" not in message and "num_groups=2" in message
    assert "per_layer=true" in message
    (message,) = warned(affinity, objective="density", kind="cosine", per_layer=True)
    assert "'mean'" in message and "'density'" not in message and "per_layer" not in message
    assert warned(affinity, num_groups=1) == []  # asked for: no warning
    assert warned(affinity, together=[[0, 1, 2, 3]]) == []
    mixed = affinity.copy()
    mixed[0, 1] = mixed[1, 0] = -0.1
    (message,) = warned(mixed)
    assert "outweigh the negative" in message
    mixed[0, 1] = mixed[1, 0] = 0
    (message,) = warned(mixed)
    assert "no pairwise affinity is negative" in message


def test_a_search_without_proof_says_so():
    partition = Partition(((0, 1), (2,)), 1.5, 5, "integer program (clique partitioning)", 2.25)
    affinity = np.array([[1, 1.5, -1], [1.5, 1, -1], [-1, -1, 1]])
    (message,) = warnings_about(affinity, partition, ["a", "b", "c"], objective="sum", kind="dot")
    assert "not proven best" in message and "1.5" in message and "2.25" in message and "time_limit_s" in message


def test_all_alone_all_zero_and_unremarkable():
    negative = 2 * np.eye(3) - 1
    (message,) = warned(negative)
    assert "Every task is alone: no pairwise affinity is positive" in message
    assert warned(negative, max_size=1) == []
    assert warned(negative, apart=[[0, 1, 2]]) == []
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
