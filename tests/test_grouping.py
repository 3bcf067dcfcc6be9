"""Affinities against explicit loops, the grouping stage on synthetic snapshots, its warnings and its figures."""

import base64
import io
import json
import math
import re
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure
from pipelines import REPOSITORY
from reference_partitions import (
    OBJECTIVES,
    REFERENCE_AFFINITIES,
    REFERENCE_SCORES,
    SIMILARITY_NAMES,
    all_partitions,
    best_by_enumeration,
    meets_constraints,
    reference_rms,
    reference_score,
)
from small_clip import small_towers
from small_problem import mmap_shape

from pipeline import command_line
from pipeline.config import CONFIGS, Config, GroupingConfig, choices, load_yaml
from pipeline.errors import UserError
from pipeline.grouping import stability
from pipeline.grouping.advice import grouping_warnings
from pipeline.grouping.affinities import AFFINITIES as AFFINITY_REGISTRY
from pipeline.grouping.affinities import get_affinity, get_similarity
from pipeline.grouping.affinity import affinity_matrix, snapshot_affinities
from pipeline.grouping.features import feature_affinity, resampled_feature_affinity
from pipeline.grouping.gradient_blocks import SOURCE, gradient_blocks, read_layout
from pipeline.grouping.graph import affinity_graph
from pipeline.grouping.objectives import get_objective
from pipeline.grouping.partition import Partition, best_partition
from pipeline.grouping.stability import ranked_partitions
from pipeline.grouping.study import partition_score
from pipeline.grouping.transfer import TransferLosses, transfer_affinity
from pipeline.methods.mmap import SharedMmap
from pipeline.report.grouping_figures import affinity_graph_figure, affinity_heat_map
from pipeline.runtime.storage import Artifact, Storage
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.stages.grouping import (
    compute_grouping,
    describe_search,
    gradient_affinity,
    grouping_artifact,
    read_grouping,
)
from pipeline.stages.grouping_solution import write_grouping
from pipeline.stages.grouping_sources import PROMPTS_OF, GroupingSources, SingleTasks
from pipeline.stages.single_tasks import LOSSES
from pipeline.training.evaluate import Prediction
from pipeline.training.snapshots import write_snapshots
from pipeline.training.trainer import Snapshot, StepRecord
from pipeline.training.training_losses import read_losses, write_losses


def random_symmetric(num_tasks: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(num_tasks, num_tasks))
    return matrix + matrix.T


# --- affinity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", SIMILARITY_NAMES)
def test_affinity_equals_explicit_loops(kind, dtype):
    rng = np.random.default_rng(0)
    gradients = (rng.normal(size=(7, 5, 33)) * rng.uniform(0.1, 10, size=33)).astype(dtype)
    rms = reference_rms(gradients.astype(np.float64))
    expected = np.zeros((5, 5))
    for snapshot in gradients.astype(np.float64):
        for i in range(5):
            for j in range(5):
                expected[i, j] += REFERENCE_AFFINITIES[kind](snapshot[i], snapshot[j], rms) / len(gradients)
    affinity = affinity_matrix(gradients, kind)
    assert affinity.dtype == np.float64
    np.testing.assert_allclose(affinity, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(affinity, affinity.T)
    np.testing.assert_allclose(snapshot_affinities(gradients, kind).mean(axis=0), affinity, rtol=1e-12, atol=1e-12)


def test_cosine_of_zero_gradient_is_zero_and_the_snapshot_counts():
    gradients = np.array([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]])
    np.testing.assert_allclose(affinity_matrix(gradients, "cosine"), [[1.0, 0.5], [0.5, 0.5]])


def test_a_parameter_without_gradients_does_not_count_for_adams_scale():
    gradients = np.array([[[1.0, 0.0, 4.0], [1.0, 0.0, -4.0]]])
    np.testing.assert_allclose(affinity_matrix(gradients, "adam_cosine"), np.eye(2), atol=1e-15)
    np.testing.assert_array_equal(affinity_matrix(np.zeros((2, 3, 4)), "adam_cosine"), np.zeros((3, 3)))


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e200])
def test_adams_scale_makes_cosines_independent_of_the_size_of_parameters(size):
    gradients = np.random.default_rng(1).normal(size=(3, 4, 10))
    scaled = gradients * np.where(np.arange(10) < 5, size, 1.0)
    cosines = affinity_matrix(gradients, "adam_cosine")
    np.testing.assert_allclose(affinity_matrix(scaled, "adam_cosine"), cosines, atol=1e-14)
    assert np.abs(affinity_matrix(scaled, "cosine") - cosines).max() > 0.1


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
        (np.ones((3, 5, 2)), "euclid", None, "'euclid' is unknown; choose from dot, cosine, adam_cosine"),
    ],
)
def test_affinity_errors(gradients, kind, tasks, message):
    with pytest.raises(ValueError, match=message):
        affinity_matrix(gradients, kind, tasks=tasks)


@pytest.mark.parametrize("kind", SIMILARITY_NAMES)
def test_affinity_of_blocks_is_the_mean_of_their_own(kind):
    gradients = np.random.default_rng(3).normal(size=(4, 3, 10))
    blocks = [np.array([0, 1, 2]), np.array([5, 9]), np.array([3, 4])]
    expected = np.mean([affinity_matrix(gradients[:, :, block], kind) for block in blocks], axis=0)
    np.testing.assert_allclose(affinity_matrix(gradients, kind, blocks=blocks), expected, atol=1e-14)
    full = affinity_matrix(gradients, kind, blocks=[np.arange(10)])
    np.testing.assert_allclose(full, affinity_matrix(gradients, kind), rtol=1e-15, atol=1e-15)


def test_the_global_prompts_layout_has_the_source():
    prompt = SharedMmap(mmap_shape(small_towers()[0]), ["ink"], seed=1)
    assert list(prompt.gradient_layout()) == [SOURCE, "text_scaling", "vision_scaling"]


LAYOUT = {"source": [3, 2, 2], "text_scaling": [3, 1, 1], "vision_scaling": [3, 1, 2]}


def test_gradient_blocks_follow_the_layout():
    (full,) = gradient_blocks(LAYOUT)
    np.testing.assert_array_equal(full, np.arange(21))
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
    full = affinity_matrix(gradients, "dot")
    np.testing.assert_allclose(
        affinity_matrix(gradients, "dot", blocks=gradient_blocks(LAYOUT, per_layer=True)), full / 3
    )


# --- transfer and features --------------------------------------------------------------------------------


def small_losses(seed: int = 0) -> TransferLosses:
    rng, sizes = np.random.default_rng(seed), (3, 7, 1, 5)
    return TransferLosses([rng.gamma(2, size=size) for size in sizes], [rng.gamma(2, size=(4, size)) for size in sizes])


def reference_transfer(zero_shot, adapted) -> np.ndarray:
    """1/2 [(zero-shot loss of j - loss of j under the prompts of i) + its mirror], image by image."""
    num_tasks = len(zero_shot)
    gain = {
        (i, j): sum(zero_shot[j]) / len(zero_shot[j]) - sum(adapted[j][i]) / len(adapted[j][i])
        for i in range(num_tasks)
        for j in range(num_tasks)
    }
    return np.array([[(gain[i, j] + gain[j, i]) / 2 for j in range(num_tasks)] for i in range(num_tasks)])


def test_transfer_equals_explicit_loops():
    losses = small_losses()
    affinity = transfer_affinity(losses.gains)
    np.testing.assert_allclose(affinity, reference_transfer(losses.zero_shot, losses.adapted), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(affinity, affinity.T)
    names = ["a", "b", "c", "d"]
    zero_shot = dict(zip(names, losses.zero_shot))
    adapted = {(i, j): losses.adapted[q][p] for p, i in enumerate(names) for q, j in enumerate(names)}
    by_name = TransferLosses.from_mappings(names[::-1], zero_shot, adapted)
    np.testing.assert_array_equal(by_name.gains, losses.gains[::-1, ::-1])
    adapted["b", "d"] = np.array([1.0, np.nan, 1.0, 1.0, 1.0])
    with pytest.raises(UserError, match="task 'd' under the prompts of 'b' are not finite: lower"):
        TransferLosses.from_mappings(names, zero_shot, adapted)
    zero_shot["c"] = np.full_like(zero_shot["c"], np.inf)
    with pytest.raises(UserError, match="task 'c' under zero-shot CLIP are not finite"):
        TransferLosses.from_mappings(names, zero_shot, adapted)


def test_transfer_resamples_the_same_images_under_all_prompts():
    losses = small_losses()
    rng = np.random.default_rng(3)
    drawn = [rng.integers(0, len(values), len(values)) for values in losses.zero_shot]
    expected = reference_transfer(
        [values[images] for values, images in zip(losses.zero_shot, drawn)],
        [values[:, images] for values, images in zip(losses.adapted, drawn)],
    )
    resampled = losses.resampled_affinity(np.random.default_rng(3))
    np.testing.assert_allclose(resampled, expected, rtol=0, atol=1e-12)
    constant = TransferLosses(losses.zero_shot, [np.tile(values - 0.25, (4, 1)) for values in losses.zero_shot])
    assert np.allclose(constant.resampled_affinity(rng), 0.25)  # paired: the images do not matter


def reference_features(features, labels) -> np.ndarray:
    """Cosines of centered centroids, image by image and class by class."""
    centroids = []
    for task_features, task_labels in zip(features, labels):
        means = []
        for label in sorted(set(task_labels.tolist())):
            rows = [f / math.sqrt(sum(f * f)) for f, other in zip(task_features, task_labels) if other == label]
            means.append(sum(rows) / len(rows))
        centroids.append(sum(means) / len(means))
    center = sum(centroids) / len(centroids)
    centered = [centroid - center for centroid in centroids]
    return np.array([[sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)) for b in centered] for a in centered])


def test_features_equal_explicit_loops():
    rng = np.random.default_rng(0)
    sizes = (9, 4, 6)
    features = [rng.normal(size=(size, 5)) + 2 for size in sizes]
    labels = [np.concatenate([[0, 1, 2], rng.integers(0, 3, size - 3)]) for size in sizes]
    labels[1] = np.array([0, 2, 2, 2])  # another number of classes
    affinity = feature_affinity(features, labels)
    np.testing.assert_allclose(affinity, reference_features(features, labels), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(affinity, affinity.T)
    scaled = [values * rng.uniform(0.1, 9, size=(len(values), 1)) for values in features]
    np.testing.assert_allclose(feature_affinity(scaled, labels), affinity, atol=1e-12)
    rng, twin = np.random.default_rng(3), np.random.default_rng(3)
    drawn = [rng.integers(0, size, size) for size in sizes]
    expected = reference_features([f[d] for f, d in zip(features, drawn)], [y[d] for y, d in zip(labels, drawn)])
    np.testing.assert_allclose(resampled_feature_affinity(features, labels, twin), expected, rtol=0, atol=1e-12)


def test_features_weigh_classes_equally_and_are_relative_to_the_average_task():
    rng = np.random.default_rng(1)
    features, labels = [rng.normal(size=(4, 6)) for _ in range(3)], [np.array([0, 0, 1, 1])] * 3
    repeated = [np.concatenate([features[0], features[0][:2]]), *features[1:]]  # class 0 has its images twice
    more_labels = [np.array([0, 0, 1, 1, 0, 0]), *labels[1:]]
    expected = feature_affinity(features, labels)
    np.testing.assert_allclose(feature_affinity(repeated, more_labels), expected, atol=1e-12)
    np.testing.assert_allclose(feature_affinity(features[:2], labels[:2]), [[1, -1], [-1, 1]], atol=1e-12)
    for copies in (features[:1], [features[0]] * 3):
        zeros = np.zeros((len(copies), len(copies)))
        np.testing.assert_array_equal(feature_affinity(copies, labels[: len(copies)]), zeros)


# --- the stage --------------------------------------------------------------------------------------------

TASKS = ["ink", "chalk", "neon"]


@pytest.fixture
def no_figures(monkeypatch):
    """The stage saves no figures and takes few resamples: both take seconds, and pipeline tests cover them."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, target, **options: target.touch())
    monkeypatch.setattr(stability, "NUM_RESAMPLES", 12)


def solve(tmp_path, gradients: np.ndarray, **options) -> dict:
    """Return grouping.json of the stage for gradients (S, T, 21)."""
    snapshots = write_gradients(Storage.from_folder(tmp_path / "storage"), TASKS, gradients)
    options = {"affinity": "gradient", **options}
    write_grouping(TASKS, GroupingSources({tuple(TASKS): snapshots}), GroupingConfig(**options), tmp_path)
    return json.loads((tmp_path / "grouping.json").read_text())


def test_the_stage_applies_its_options_and_records_them(no_figures, tmp_path):
    gradients = np.zeros((2, 3, 21))
    gradients[:, :, :4] = np.array([1.0, 1.0, -1.0])[:, None]  # layer 1 of the source: ink and chalk
    gradients[:, :, 4:12] = np.array([0.1, -0.1, -0.1])[:, None]  # its other layers: chalk and neon, but short
    gradients[:, :, 12:] = np.array([3.0, -3.0, 3.0])[:, None]  # the scaling matrices: ink and neon
    result = solve(tmp_path, gradients)
    assert result["groups"] == [["ink", "neon"], ["chalk"]]
    assert result["method"] == "dynamic programming over subsets"
    assert result["is_optimal"] and result["num_candidates"] == 5
    assert result["upper_bound"] == result["score"] > 0
    result = solve(tmp_path, gradients, scaling_matrices=False, objective="density")
    assert result["groups"] == [["ink", "chalk"], ["neon"]]
    assert (result["scaling_matrices"], result["per_layer"], result["objective"]) == (False, False, "density")
    result = solve(tmp_path, gradients, scaling_matrices=False, per_layer=True, gradient_similarity="cosine")
    assert result["groups"] == [["ink"], ["chalk", "neon"]]
    result = solve(tmp_path, gradients, must_link=[["ink", "chalk"]], cannot_link=[["neon", "ink"]])
    assert result["groups"] == [["ink", "chalk"], ["neon"]]
    assert result["constraints"]["must_link"] == [["ink", "chalk"]] and result["num_candidates"] == 1
    assert describe_search(result) == "optimal among 1 partitions · dynamic programming over subsets"


def small_plan(storage: Storage, tasks: list[str], **options) -> SimpleNamespace:
    """The part of a plan that the grouping uses."""

    def artifact(stage: str, inputs: dict) -> Artifact:
        return Artifact(storage, stage, inputs)

    options = {"affinity": "gradient", **options}
    return SimpleNamespace(tasks=tasks, config=Config(grouping=GroupingConfig(**options)), artifact=artifact)


def write_gradients(storage: Storage, tasks: list[str], gradients: np.ndarray) -> Artifact:
    """Return a complete global prompt artifact with gradients (S, T, 21)."""
    artifact = Artifact(storage, "global_prompt", {"gradients": gradients.tolist(), "tasks": tasks})
    losses = (1.0,) * len(tasks)
    records = [StepRecord(step, 1, 0.1, losses, losses) for step in range(1, len(gradients) + 1)]
    pairs = zip(records, torch.tensor(gradients, dtype=torch.float32))
    with artifact.writer() as writer:
        write_snapshots(writer.folder / SNAPSHOTS, tasks, [Snapshot(*pair, torch.zeros(21)) for pair in pairs], LAYOUT)
    return artifact


@dataclass
class GroupingResult:
    result: dict
    """Contents of grouping.json."""
    page: str
    figures: dict[str, Figure]
    """Title on the page → figure."""
    figures_by_file: dict[str, Figure]

    def bars(self, figure: Figure) -> dict[str, float]:
        axes = figure.axes[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        return dict(zip(names, (bar.get_width() for bar in axes.patches), strict=True))


@pytest.fixture
def run_grouping(tmp_path, no_figures, monkeypatch):
    """Run the stage on gradients; figures are stored instead of rendered."""
    figures_by_file: dict[str, Figure] = {}

    def store(figure: Figure, target, **options):
        figures_by_file[target.name] = figure
        target.write_text(target.name)

    monkeypatch.setattr(Figure, "savefig", store)
    storage = Storage.from_folder(tmp_path / "storage")

    def run(tasks: list[str], sources: np.ndarray | GroupingSources, **options) -> GroupingResult:
        plan = small_plan(storage, tasks, **options)
        if isinstance(sources, np.ndarray):
            sources = GroupingSources.of(write_gradients(storage, tasks, sources), None)
        artifact = grouping_artifact(plan, sources)
        assert compute_grouping(plan, sources, artifact)
        page = (artifact.download() / "grouping.html").read_text()
        images = re.findall('<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', page)
        page_figures = {title: figures_by_file[base64.b64decode(token).decode()] for title, token in images}
        return GroupingResult(read_grouping(artifact), page, page_figures, dict(figures_by_file))

    return run


def reference_affinity(
    gradients: np.ndarray, gradient_similarity: str, per_layer: bool, scaling_matrices: bool
) -> np.ndarray:
    """Affinities of gradients with the layout above, pair by pair."""
    source = [[4 * layer + offset for offset in range(4)] for layer in range(3)]
    scaling = [[12 + layer, 15 + 2 * layer, 16 + 2 * layer] for layer in range(3)]
    layers = [indices + extra if scaling_matrices else indices for indices, extra in zip(source, scaling)]
    blocks = layers if per_layer else [sum(layers, [])]
    num_tasks = gradients.shape[1]
    expected = np.zeros((num_tasks, num_tasks))
    stored = gradients.astype(np.float32).astype(np.float64)
    rms = np.array(reference_rms(stored))
    for i in range(num_tasks):
        for j in range(num_tasks):
            products = []
            for snapshot in stored:
                for block in blocks:
                    values = snapshot[i, block].tolist(), snapshot[j, block].tolist(), rms[block].tolist()
                    products.append(REFERENCE_AFFINITIES[gradient_similarity](*values))
            expected[i, j] = np.mean(products)
    return expected


def to_names(groups, tasks) -> list[list[str]]:
    return [[tasks[task] for task in group] for group in groups]


def to_text(groups: list[list[str]]) -> str:
    return " | ".join(" + ".join(group) for group in groups)


MORE_TASKS = ["chalk", "ink", "neon", "noise", "outline"]
CONSTRAINTS = {
    "no constraints": {},
    "num_groups": {"num_groups": 4},
    "min_size": {"min_size": 2},
    "max_size": {"max_size": 2},
    "must_link": {"must_link": [["chalk", "outline"], ["ink", "neon"]]},
    "cannot_link": {"cannot_link": [["chalk", "neon", "noise"]]},
    "all": {
        "num_groups": 2,
        "min_size": 2,
        "max_size": 3,
        "must_link": [["ink", "noise"]],
        "cannot_link": [["chalk", "ink"]],
    },
}
AFFINITIES = [
    {"gradient_similarity": similarity, "per_layer": per_layer, "scaling_matrices": scaling_matrices}
    for similarity in SIMILARITY_NAMES
    for per_layer in (False, True)
    for scaling_matrices in (False, True)
]
OPTIONS = [
    *((affinity, "no constraints") for affinity in AFFINITIES),
    *((AFFINITIES[-1], name) for name in list(CONSTRAINTS)[1:]),
]


def best_groups_text(gradients: np.ndarray, objective: str, affinity: dict, **constraints) -> str:
    groups, *_ = best_by_enumeration(reference_affinity(gradients, **affinity), objective, **constraints)
    return to_text(to_names(groups, MORE_TASKS))


def discriminating_gradients(objective: str, affinity: dict, constraints: dict) -> np.ndarray:
    """Return gradients (1, 5, 21) whose groups differ without the constraints or, if there are none, with another
    objective or affinity: otherwise the test could miss a part of the stage that ignores the options."""
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        gradients = rng.normal(size=(1, 5, 21)) * rng.uniform(0.2, 3, size=21)
        best = best_groups_text(gradients, objective, affinity, **constraints)
        alternatives = [(objective, affinity)]
        if not constraints:
            alternatives = [(name, affinity) for name in OBJECTIVES if name != objective]
            if affinity["gradient_similarity"] != "dot":  # with which per_layer changes nothing
                alternatives += [(objective, affinity | {"per_layer": not affinity["per_layer"]})]
                alternatives += [(objective, affinity | {"gradient_similarity": "dot"})]
            alternatives += [(objective, affinity | {"scaling_matrices": not affinity["scaling_matrices"]})]
        if all(best != best_groups_text(gradients, *alternative) for alternative in alternatives):
            return gradients
    raise AssertionError("no such gradients")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("affinity", "constraints"), OPTIONS, ids=str)
def test_all_outputs_follow_the_configured_score_and_constraints(run_grouping, objective, affinity, constraints):
    """Snapshots differ only in length: the same partition is optimal for every part or resample of them."""
    options = CONSTRAINTS[constraints]
    index_options = {
        name: [[MORE_TASKS.index(task) for task in tasks] for tasks in value] if isinstance(value, list) else value
        for name, value in options.items()
    }
    lengths = np.random.default_rng(0).uniform(0.5, 2, size=(9, 1, 1))
    gradients = lengths * discriminating_gradients(objective, affinity, index_options)
    run = run_grouping(MORE_TASKS, gradients, objective=objective, **affinity, **options)
    result, stats = run.result, run.result["stability"]

    expected = reference_affinity(gradients, **affinity)
    np.testing.assert_allclose(result["affinity"], expected, rtol=1e-6, atol=1e-9)
    scores = {
        to_text(to_names(groups, MORE_TASKS)): reference_score(expected, groups, objective)
        for groups in all_partitions(5)
        if meets_constraints(groups, **index_options)
    }
    ranked = sorted(scores, key=lambda groups: -scores[groups])
    best = ranked[0]

    assert to_text(result["groups"]) == best
    assert result["score"] == result["upper_bound"] == pytest.approx(scores[best]) and result["is_optimal"]
    assert result["num_candidates"] == len(scores)
    assert (result["objective"], result["affinity_kind"]) == (objective, "gradient")
    assert result["gradient_similarity"] == affinity["gradient_similarity"]
    expected_candidate = {"affinity": "gradient", "similarity": affinity["gradient_similarity"], "is_taken": True}
    (candidate,) = result["candidates"]
    assert candidate == expected_candidate | {name: result[name] for name in ("objective", "groups", "score")}
    assert {name: result["constraints"][name] for name in options} == options
    assert [(to_text(row["groups"]), row["frequency"]) for row in stats["resampled"]] == [(best, 1.0)]
    assert {to_text(row["groups"]) for row in result["training"]["phases"]} == {best}
    task_to_group = {task: group for group in best.split(" | ") for task in group.split(" + ")}
    assert stats["co_assignment"] == [
        [float(task_to_group[i] == task_to_group[j]) for j in MORE_TASKS] for i in MORE_TASKS
    ]
    assert [to_text(row["groups"]) for row in stats["ranked"]] == ranked[:10]
    assert [row["score"] for row in stats["ranked"]] == pytest.approx([scores[groups] for groups in ranked[:10]])

    similarity = affinity["gradient_similarity"].replace("_", " ")
    assert f"Objective <code>{objective}</code> of <code>gradient ({similarity})</code> affinities" in run.page
    assert "100 % of 12 bootstrap resamples of the snapshots give the same groups" in run.page
    bars = run.bars(run.figures["Partitions with the highest scores"])
    assert list(bars) == ranked[:10] and bars == pytest.approx({groups: scores[groups] for groups in ranked[:10]})
    assert run.figures_by_file["ranked_partitions.png"] is run.figures["Partitions with the highest scores"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_reported_partitions_of_many_tasks_meet_the_constraints_and_have_their_scores(run_grouping, objective):
    tasks = [f"task{number}" for number in range(9)]  # too many to rank all partitions
    gradients = np.random.default_rng(3).normal(size=(6, 9, 21))
    constraints = {"num_groups": 3, "min_size": 2, "max_size": 4, "cannot_link": [["task0", "task4"]]}
    run = run_grouping(tasks, gradients, objective=objective, **constraints)
    stats, affinity = run.result["stability"], reference_affinity(gradients, "dot", False, True)
    reported = [
        run.result,
        *stats["ranked"],
        *stats["resampled"],
        *run.result["training"]["phases"],
    ]
    assert len(stats["ranked"]) > 3 and len(stats["resampled"]) > 1

    def to_indices(groups: list[list[str]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tasks.index(task) for task in group) for group in groups)

    constraints = constraints | {"cannot_link": [[0, 4]]}
    assert all(meets_constraints(to_indices(row["groups"]), **constraints) for row in reported)
    scores = [reference_score(affinity, to_indices(row["groups"]), objective) for row in stats["ranked"]]
    assert [row["score"] for row in stats["ranked"]] == pytest.approx(scores) and scores[0] == max(scores)
    assert list(run.bars(run.figures["Partitions with the highest scores"]).values()) == pytest.approx(scores)


def write_measured(storage: Storage, tasks: list[str], seed: int = 0) -> tuple[Artifact, SingleTasks, dict]:
    """Return a global prompt, and losses and features as of stage 3, with random values, and these values."""
    rng, sizes = np.random.default_rng(seed), range(4, 4 + len(tasks))
    labels = {task: np.arange(size) % 3 for task, size in zip(tasks, sizes)}
    features = {task: rng.normal(size=(size, 5)).astype(np.float32) for task, size in zip(tasks, sizes)}
    losses = {(i, j): rng.gamma(2, size=len(labels[j])) for i in (None, *tasks) for j in tasks}
    artifacts = []
    for prompts_of in (None, *tasks):
        artifact = Artifact(storage, "single_tasks", {PROMPTS_OF: prompts_of, "tasks": tasks, "seed": seed})
        predictions = [
            Prediction(task, "", int(label), 0, 0.5, float(loss))
            for task in tasks
            for label, loss in zip(labels[task], losses[prompts_of, task])
        ]
        stored = {} if prompts_of else {task: torch.tensor(values) for task, values in features.items()}
        with artifact.writer() as writer:
            write_losses(writer.folder / LOSSES, predictions, stored)
        artifacts.append(artifact)
    gradients = rng.normal(size=(4, len(tasks), 21))
    expected = {
        "transfer": reference_transfer(
            [losses[None, j] for j in tasks], [np.array([losses[i, j] for i in tasks]) for j in tasks]
        ),
        "gradient": reference_affinity(gradients, "dot", False, True),
        "features": reference_features(
            [values.astype(np.float64) for values in features.values()], list(labels.values())
        ),
    }
    return write_gradients(storage, tasks, gradients), SingleTasks({}, tuple(artifacts)), expected


@pytest.mark.parametrize("taken", AFFINITY_REGISTRY)
def test_every_affinity_has_its_groups_and_the_configs_decides(run_grouping, tmp_path, taken):
    storage = Storage.from_folder(tmp_path / "storage")
    for seed in range(100):
        global_prompt, single_tasks, expected = write_measured(storage, TASKS, seed)
        best = {kind: best_by_enumeration(matrix, "sum") for kind, matrix in expected.items()}
        if len({groups for groups, *_ in best.values()}) == 3:
            break
    run = run_grouping(TASKS, GroupingSources.of(global_prompt, single_tasks), affinity=taken)
    result, candidates = run.result, run.result["candidates"]
    np.testing.assert_allclose(result["affinity"], expected[taken], rtol=1e-6, atol=1e-9)
    assert result["groups"] == to_names(best[taken][0], TASKS) and result["score"] == pytest.approx(best[taken][1])
    assert [item["affinity"] for item in candidates][0] == taken == result["affinity_kind"]
    assert {item["affinity"]: item["groups"] for item in candidates} == {
        kind: to_names(groups, TASKS) for kind, (groups, *_) in best.items()
    }
    assert {item["affinity"]: item["score"] for item in candidates} == pytest.approx(
        {kind: score for kind, (_, score, _) in best.items()}
    )
    assert [item["is_taken"] for item in candidates] == [True, False, False]
    assert {item["affinity"]: item["similarity"] for item in candidates}["gradient"] == "dot"
    assert all(to_text(item["groups"]) in run.page for item in candidates)
    assert ("training" in result) == ("affinity_over_training.png" in run.figures_by_file) == (taken == "gradient")
    assert (result["gains"] is not None) == ("Gains from each other" in run.page) == (taken == "transfer")
    stability = result["stability"]
    assert stability["resampled_from"] == ("snapshots" if taken == "gradient" else "training images")
    assert stability["num_resampled"] == (4 if taken == "gradient" else 15)
    assert stability["num_resamples"] == 12 and sum(row["frequency"] for row in stability["resampled"]) <= 1.0001


@pytest.mark.parametrize("preset", ["office_home", "mini_domainnet", "paper_protocol"])
def test_the_papers_presets_take_the_papers_affinity_and_objective(run_grouping, tmp_path, preset):
    """Sums of dot products (Eq. 8), although transfer and features would choose other groups."""
    options = load_yaml(CONFIGS / f"{preset}.yaml")["grouping"]
    storage = Storage.from_folder(tmp_path / "storage")
    global_prompt, single_tasks, expected = write_measured(storage, TASKS, seed=1)
    paper, transfer = (best_by_enumeration(expected[kind], "sum")[0] for kind in ("gradient", "transfer"))
    assert paper != transfer
    result = run_grouping(TASKS, GroupingSources.of(global_prompt, single_tasks), **options).result
    assert result["groups"] == to_names(paper, TASKS) and result["objective"] == "sum"
    np.testing.assert_allclose(result["affinity"], expected["gradient"], rtol=1e-6, atol=1e-9)
    assert run_grouping(TASKS, GroupingSources.of(global_prompt, single_tasks), affinity="transfer").result[
        "groups"
    ] == to_names(transfer, TASKS)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_hipros_tree_is_from_the_gradients_whatever_the_groups_are_by(tmp_path, similarity):
    storage = Storage.from_folder(tmp_path)
    gradients = np.random.default_rng(2).normal(size=(4, 3, 21))
    plan = small_plan(storage, TASKS, affinity="transfer", gradient_similarity=similarity)
    affinities = gradient_affinity(plan, write_gradients(storage, TASKS, gradients))
    np.testing.assert_allclose(affinities, reference_affinity(gradients, similarity, False, True), rtol=1e-6, atol=1e-9)


def test_sources_determine_only_the_affinities_that_they_measure(tmp_path):
    global_prompt, single_tasks, _ = write_measured(Storage.from_folder(tmp_path), TASKS)
    assert list(GroupingSources.of(global_prompt, single_tasks).affinities(TASKS)) == list(AFFINITY_REGISTRY)
    assert list(GroupingSources.of(global_prompt, None).affinities(TASKS)) == ["gradient"]
    assert list(GroupingSources.of(None, SingleTasks({}, single_tasks.losses[:1])).affinities(TASKS)) == ["features"]
    assert list(GroupingSources.of(None, SingleTasks({}, single_tasks.losses[:3])).affinities(TASKS)) == ["features"]
    assert list(GroupingSources.of(None, single_tasks).affinities(TASKS)) == ["transfer", "features"]
    assert list(GroupingSources.of(global_prompt, single_tasks).affinities([*TASKS, "oil"])) == []


def test_damaged_losses_are_named(tmp_path):
    with pytest.raises(UserError, match="losses.parquet cannot be read as losses .*: remove .* and run again"):
        read_losses(tmp_path / LOSSES)


def test_description_of_a_search():
    result = {"num_candidates": None, "is_optimal": False, "method": "integer program"}
    assert describe_search(result) == "not proven optimal · integer program"
    result |= {"num_candidates": 10**20, "is_optimal": True}
    assert describe_search(result).startswith("optimal among 1.0e+20 partitions")


def test_bad_snapshots_are_named(no_figures, tmp_path):
    gradients = np.ones((3, 3, 21))
    gradients[1, 2, 5] = np.nan
    with pytest.raises(UserError, match=r"snapshot 1, task 2 \('neon'\): 1 of 21 .* lower training.learning_rate"):
        solve(tmp_path, gradients)
    with pytest.raises(UserError, match="has no snapshots; .* with a smaller global_prompt.snapshot_every"):
        solve(tmp_path, np.ones((0, 3, 21)))
    with pytest.raises(UserError, match="no gradient snapshots; train the global prompt again"):
        read_layout(tmp_path / "nowhere.parquet")
    solve(tmp_path, np.ones((3, 3, 21)))
    tasks, storage = [*TASKS, "oil"], Storage.from_folder(tmp_path / "storage")
    snapshots = write_gradients(storage, TASKS, np.ones((3, 3, 21)))
    with pytest.raises(UserError, match="step 1 lacks the tasks oil"):
        write_grouping(tasks, GroupingSources({tuple(tasks): snapshots}), GroupingConfig(affinity="gradient"), tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[[ink_left, oil]]", "cannot_link: [ink_left, oil]: 'oil' is not a task; tasks: "),
        ("[[ink_left, blur_left]]", "must_link puts 'blur_left' and 'ink_left' in one group, cannot_link forbids it"),
    ],
)
def test_constraints_are_checked_before_the_job_starts(tmp_path, monkeypatch, capsys, value, message):
    options = ["--grouping.must_link", "[[blur_left, ink_left]]", "--grouping.cannot_link", value]
    monkeypatch.setattr(sys, "argv", ["full_pipeline.py", "--storage", str(tmp_path / "storage"), *options])
    with pytest.raises(SystemExit) as end:
        command_line.run_job("", lambda run: pytest.fail("the job started"))
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# --- warnings -------------------------------------------------------------------------------------------


ALL_KINDS = [("transfer", None), ("features", None), *(("gradient", name) for name in SIMILARITY_NAMES)]


def get_warnings(
    affinity, *, objective="sum", kind="gradient", similarity="dot", per_layer=False, **constraints
) -> list[str]:
    names = [f"task{index}" for index in range(len(affinity))]
    partition = best_partition(affinity, objective=objective, **constraints)
    return grouping_warnings(
        affinity, partition, names, objective=objective, kind=kind, similarity=similarity, per_layer=per_layer
    )


def test_collapse_into_one_group_says_what_to_do():
    affinity = np.ones((4, 4))
    (message,) = get_warnings(affinity)
    assert "All 4 tasks are in one group: every pairwise affinity is positive" in message
    assert "objective mean" in message and "density" in message and "num_groups 2" in message and "cosine" in message
    (message,) = get_warnings(affinity, objective="mean", similarity="cosine")
    assert "objective" not in message and "similarity cosine" not in message and "num_groups 2" in message
    assert "--grouping.per_layer true" in message
    (message,) = get_warnings(affinity, objective="density", similarity="cosine", per_layer=True)
    assert "objective mean" in message and "density" not in message and "per_layer" not in message
    assert get_warnings(affinity, num_groups=1) == []  # requested: no warning
    assert get_warnings(affinity, must_link=[[0, 1, 2, 3]]) == []
    mixed = affinity.copy()
    mixed[0, 1] = mixed[1, 0] = -0.1
    (message,) = get_warnings(mixed)
    assert "outweigh the negative" in message
    mixed[0, 1] = mixed[1, 0] = 0
    (message,) = get_warnings(mixed)
    assert "no pairwise affinity is negative" in message


@pytest.mark.parametrize(("kind", "similarity"), ALL_KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_and_affinity_advises_what_splits_more(objective, kind, similarity):
    """An objective is advised if it splits a triple that this one keeps: 0-1-2 with one strong pair."""

    def pair_share(name: str) -> float:
        return REFERENCE_SCORES[name](np.ones((3, 3)), (0, 1)) / REFERENCE_SCORES[name](np.ones((3, 3)), (0, 1, 2))

    (message,) = get_warnings(np.ones((4, 4)), objective=objective, kind=kind, similarity=similarity)
    for name in OBJECTIVES:
        advised = re.search(rf"(--grouping.objective|or) {name}\b", message.partition("To split it, try ")[2])
        assert bool(advised) == (pair_share(name) > pair_share(objective) + 1e-9), name
    advice = message.partition("To split it, try ")[2]
    assert f"--grouping.affinity {kind}" not in advice and f"--grouping.gradient_similarity {similarity}" not in advice
    assert message.count("; ") == 1  # the advice of the affinity


def test_tasks_that_gain_nothing_from_their_own_prompts_are_named():
    affinity = np.array([[0.5, 0.1, -0.3], [0.1, -0.02, 0.2], [-0.3, 0.2, 0.4]])
    (message,) = get_warnings(affinity, kind="transfer")
    assert "zero-shot CLIP's: task1 (-0.02)." in message and "training.epochs" in message
    assert get_warnings(affinity, kind="features") == []


def test_names_are_those_of_the_registries_everywhere():
    assert set(REFERENCE_SCORES) == set(OBJECTIVES) and set(REFERENCE_AFFINITIES) == set(SIMILARITY_NAMES)
    fields = GroupingConfig.model_fields
    assert choices(fields["objective"]) == OBJECTIVES and choices(fields["affinity"]) == tuple(AFFINITY_REGISTRY)
    assert choices(fields["gradient_similarity"]) == SIMILARITY_NAMES
    for objective in OBJECTIVES:
        assert get_objective(objective).summary in fields["objective"].description
    for kind in AFFINITY_REGISTRY:
        assert get_affinity(kind).summary in fields["affinity"].description
    for similarity in SIMILARITY_NAMES:
        assert get_similarity(similarity).summary in fields["gradient_similarity"].description
    table = (REPOSITORY / "docs" / "task_grouping.md").read_text()
    assert all(
        f"\n| `{name}` | `" in table for name in (*OBJECTIVES, *AFFINITY_REGISTRY, *SIMILARITY_NAMES)
    )  # its name, its formula


def test_an_unknown_name_cannot_be_scored():
    partition = Partition(((0, 1),), 1.0, 2, "", 1.0)
    for use in (
        lambda: best_partition(np.ones((2, 2)), objective="most"),
        lambda: partition_score(np.ones((2, 2)), ((0, 1),), "most"),
        lambda: ranked_partitions(np.ones((2, 2)), ((0, 1),), "most", ["a", "b"]),
        lambda: grouping_warnings(
            np.ones((2, 2)), partition, ["a", "b"], objective="most", kind="gradient", similarity="dot"
        ),
        lambda: grouping_warnings(np.ones((2, 2)), partition, ["a", "b"], objective="sum", kind="most"),
        lambda: grouping_warnings(
            np.ones((2, 2)), partition, ["a", "b"], objective="sum", kind="gradient", similarity="most"
        ),
        lambda: affinity_matrix(np.ones((1, 2, 3)), "most"),
    ):
        with pytest.raises(UserError, match="'most' is unknown; choose from "):
            use()


def test_warning_about_a_search_without_proof():
    partition = Partition(((0, 1), (2,)), 1.5, 5, "integer program", 2.25)
    affinity = np.array([[1, 1.5, -1], [1.5, 1, -1], [-1, -1, 1]])
    (message,) = grouping_warnings(
        affinity, partition, ["a", "b", "c"], objective="sum", kind="gradient", similarity="dot"
    )
    assert "Not proven optimal" in message and "1.5" in message and "2.25" in message and "time_limit_s" in message


def test_all_alone_all_zero_and_unremarkable():
    negative = 2 * np.eye(3) - 1
    (message,) = get_warnings(negative)
    assert "Every group has a single task: no pairwise affinity is positive" in message
    assert get_warnings(negative, max_size=1) == []
    assert get_warnings(negative, cannot_link=[[0, 1, 2]]) == []
    (message,) = get_warnings(np.eye(3))
    assert "All affinities between tasks are zero" in message
    blocks = np.kron(np.eye(2), np.ones((2, 2))) * 2 - 1
    assert get_warnings(blocks) == []


def test_dominant_and_missing_gradients_are_named():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 4, 50))
    gradients[:, 1] *= 5
    gradients[:, 3] = 0
    messages = "\n".join(get_warnings(affinity_matrix(gradients, "dot")))
    assert "Task 'task1' has by far the largest gradients" in messages
    assert "zero in every snapshot for: 'task3'" in messages
    assert "largest gradients" not in "\n".join(get_warnings(affinity_matrix(gradients, "cosine"), similarity="cosine"))


def test_warnings_check_the_number_of_names():
    partition = best_partition(np.eye(3))
    with pytest.raises(ValueError, match="2 task names for an affinity matrix of 3 tasks"):
        grouping_warnings(np.eye(3), partition, ["a", "b"], objective="sum", kind="gradient", similarity="dot")


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
            affinity_graph_figure(affinity_graph(affinity, names, groups)),
        ):
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=40)
            assert image.getvalue().startswith(b"\x89PNG")
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
        affinity_graph_figure(affinity_graph(affinity, names, groups)),
    ):
        figure.savefig(io.BytesIO())  # runs the layout
        canvas = figure.bbox
        extent = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert extent.x0 >= -1 and extent.y0 >= -1
        assert extent.x1 <= canvas.x1 + 1 and extent.y1 <= canvas.y1 + 1
