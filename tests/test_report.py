"""The report of a run: scores from predictions, warnings, the page, next steps."""

from __future__ import annotations

import io
import re
import shlex
import sys
from html import unescape
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from small_problem import TEST_COUNTS, write_test_splits

from jobs.serve import parse_models
from pipeline.data import parquet
from pipeline.data.parquet import SplitReader
from pipeline.grouping.text import describe_candidates
from pipeline.methods.registry import DEFAULT_VARIANTS
from pipeline.report import run_page
from pipeline.report.next_steps import comparison_step, format_next_steps, next_steps
from pipeline.report.recommendation import (
    STRATEGIES,
    recommendation,
    recommended_strategy,
    strategy_differences,
)
from pipeline.report.run_page import Mistake, RunDetails, mistakes_per_task, shown_methods
from pipeline.report.scores import (
    Confusion,
    Estimate,
    TaskScores,
    average_difference,
    paired_difference,
    read_scores,
    write_run_predictions,
)
from pipeline.report.summary import (
    Summary,
    accuracy_table,
    method_result,
    result_warnings,
    to_mlflow_description,
)
from pipeline.stages.report import print_notes
from pipeline.training.evaluate import Prediction, write_predictions


def scores_of(labels, predicted, probabilities=None, num_classes=3) -> TaskScores:
    names = tuple(f"class {label}" for label in range(num_classes))
    probabilities = np.full(len(labels), 0.5) if probabilities is None else np.array(probabilities)
    return TaskScores(names, np.array(labels), np.array(predicted), probabilities)


def with_accuracy(correct: int, images: int, num_classes: int = 2) -> TaskScores:
    """Scores of a test set of alternating classes, whose first images are classified correctly."""
    labels = np.arange(images) % num_classes
    return scores_of(
        labels, np.where(np.arange(images) < correct, labels, (labels + 1) % num_classes), None, num_classes
    )


def test_scores_of_a_task():
    scores = scores_of([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 2], [0.9, 0.6, 0.8, 0.7, 0.8, 0.4])
    assert scores.value == 0.5 and scores.standard_error == pytest.approx((0.25 / 6) ** 0.5)
    images, hits = scores.class_counts()
    assert (list(images), list(hits)) == ([3, 2, 1], [1, 1, 1])
    confusions = scores.confusions()
    assert confusions[0] == Confusion(0, 1, 2) and sum(confusion.images for confusion in confusions) == 6
    assert scores.worst_mistakes(2) == [2, 4] and scores.worst_mistakes(9) == [2, 4, 1]


def test_differences_are_paired_by_image():
    a, b = scores_of([0] * 100, [0] * 60 + [1] * 40), scores_of([0] * 100, [0] * 50 + [1] * 50)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.1)
    # Ten images differ, all in one direction: variance 0.1 - 0.1², far below that of two separate test sets.
    assert difference.standard_error == pytest.approx((0.09 / 100) ** 0.5)
    assert paired_difference(a, a) == (0, 0)
    average = average_difference({"x": a, "y": a}, {"x": b, "y": a})
    assert average == pytest.approx((0.05, 0.03 / 2))


@pytest.mark.parametrize(
    "scores, is_chance",
    [
        (with_accuracy(20, 140, 7), True),  # 14.3 %: random weights
        (with_accuracy(5, 140, 7), True),  # below chance
        (with_accuracy(30, 140, 7), False),
        (with_accuracy(3, 4, 2), True),  # four images tell nothing
        (with_accuracy(75, 100, 2), False),
    ],
)
def test_results_at_chance_are_recognized(scores, is_chance):
    assert scores.is_at_chance == is_chance


def test_warnings_name_the_method_the_task_and_the_size():
    good, better, chance = with_accuracy(150, 200), with_accuracy(180, 200), with_accuracy(100, 200)
    assert result_warnings({"zero_shot": {"a": good}, "grouped": {"a": better}}) == []
    (warning,) = result_warnings({"zero_shot": {"a": better, "b": good}, "grouped": {"a": good, "b": better}})
    assert re.search(r"MmAP, grouped is below zero-shot CLIP on a \(-15.0 ± 2.5 points\)", warning)
    (warning,) = result_warnings({"zero_shot": {"a": chance}})
    assert "chance" in warning and "a (50.0 %, 2 classes)" in warning and "learning rate" in warning
    constant = scores_of([0, 1] * 100, [1] * 200, num_classes=2)
    assert any(
        "same class for every image: 'class 1' (a)" in line for line in result_warnings({"grouped": {"a": constant}})
    )
    (warning,) = result_warnings({"zero_shot": {"a": with_accuracy(60, 64), "b": good}})
    assert "few test images: a 64 (standard error up to 6 points)" in warning


def test_predictions_of_a_run_are_read_and_written(tmp_path):
    def prediction(task, number, label, predicted):
        return Prediction(task, f"{task}/{number}.png", label, predicted, 0.25 + number / 8, 1.5)

    group_b = [prediction("b", 0, 0, 1), prediction("b", 1, 1, 1)]
    group_ac = [prediction("a", 0, 2, 2), prediction("c", 0, 0, 0), prediction("c", 1, 0, 1)]
    files = [tmp_path / "first.parquet", tmp_path / "second.parquet"]
    for file, predictions in zip(files, (group_b, group_ac)):
        write_predictions(file, predictions)
    class_names = {task: ["cat", "dog", "fish"] for task in "abc"}
    scores = read_scores(files, class_names)
    assert list(scores) == ["a", "b", "c"] and [s.value for s in scores.values()] == [1, 0.5, 0.5]
    arrays = (scores["a"].labels, scores["a"].predicted, scores["a"].probabilities)
    assert sum(array.itemsize for array in arrays) == 12  # bytes an image and method: DomainNet has 600,000 images
    write_run_predictions(tmp_path / "all.parquet", {"grouped": files, "zero_shot": files}, class_names)
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert len(rows) == 10 and {row["method"] for row in rows} == {"grouped", "zero_shot"}
    assert rows[0] == {
        **{"path": "b/0.png", "task": "b", "method": "grouped"},
        **{"true_label": "cat", "label": "dog", "probability": 0.25, "loss": 1.5},
    }


def test_rows_of_a_split_are_read_by_position(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 3000)
    monkeypatch.setattr(parquet, "PART_BYTES", 8000)
    write_test_splits(tmp_path)
    reader = SplitReader(tmp_path / "splits")
    assert len(list((tmp_path / "splits" / "test").glob("chalk-*"))) > 1
    rows = list(reader.rows("test", "chalk", ("path", "image")))
    positions = [TEST_COUNTS["chalk"] - 1, 0, 7, 8]
    selected = reader.rows_at("test", "chalk", positions, ("path", "image"))
    assert selected == {position: rows[position] for position in positions}
    assert reader.rows_at("test", "chalk", [], ("path",)) == {}


# --- the page ---------------------------------------------------------------------------------------------

DETAILS = RunDetails(
    title_facts=("CLIP <x>",),
    accuracy_figure=b"png",
    grouping_figures={"affinities": b"png"},
    skipped=["3 broken images dropped"],
    findings=[],
    data_page="../data_check/check.html",
    next_steps=next_steps("/runs/a b", "d", "t", ["/data/a b"], "sqlite:////runs/mlflow.db", "/#/experiments/1"),
    command="python jobs/full_pipeline.py",
    config="name: <b>",
    versions={"torch": "2"},
)


def make_page(scores: dict[str, dict[str, TaskScores]], mistakes=None, tasks=None) -> str:
    """Build the page of methods → scores."""
    counts = {task: task_scores.num_images for task, task_scores in scores["grouped"].items()}
    results = {
        method: method_result({task: s.value for task, s in by_task.items()}, dict.fromkeys(by_task, 1.0), counts, 10)
        for method, by_task in scores.items()
    }
    summary = Summary(
        *("a <i>name</i>", list(counts), [list(counts)], {"report": 1.0}, results, 8, 1, "small"),
        result_warnings(scores),
        counts,
        conclusion=recommendation(strategy_differences(scores), [list(counts)]),
        grouping="Groups by <affinity>.",
    )
    return run_page.run_page(summary, scores, mistakes or {}, DETAILS)


def random_scores(num_classes: int, accuracy: float, prefix: str = "class") -> TaskScores:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), 10)
    predicted = np.where(rng.random(len(labels)) < accuracy, labels, rng.integers(0, num_classes, len(labels)))
    names = tuple(f"{prefix} {label}" for label in range(num_classes))
    return TaskScores(names, labels, predicted, rng.random(len(labels)))


def test_nothing_of_a_name_runs():
    name = '<script>alert("1")</script>'
    task = f"task & {name}"
    scores = {method: {task: random_scores(4, 0.6, name)} for method in ("zero_shot", "grouped")}
    mistake = Mistake(f"{name}.png", name, name, 0.9, b"jpeg")
    page = make_page(scores, {(task, "grouped"): [mistake]})
    assert "<script" not in page and "<i>name" not in page and "name: <b>" not in page
    assert page.count("&lt;script&gt;") > 20 and "task &amp; &lt;script&gt;" in page


@pytest.mark.parametrize("num_classes, has_matrix", [(10, True), (65, True), (345, False)])
def test_confusions_are_readable_with_any_number_of_classes(num_classes, has_matrix):
    scores = {method: {"a": random_scores(num_classes, 0.7)} for method in ("zero_shot", "grouped")}
    page = make_page(scores)
    assert ("<svg" in page) == has_matrix and len(page) < 400_000
    assert "taken for" in page and "pairs more, in confusions.parquet" in page
    pairs = [c for c in scores["grouped"]["a"].confusions() if c.label != c.predicted]
    assert f"<td>class {pairs[0].label}</td><td>class {pairs[0].predicted}</td>" in page
    for label in range(num_classes):
        assert f'<td>class {label}</td><td class="bar">' in page


def test_the_page_is_self_contained_and_fits_a_phone_and_paper():
    page = make_page({"zero_shot": {"a": random_scores(5, 0.9)}, "grouped": {"a": random_scores(5, 0.5)}})
    assert 'name="viewport"' in page and "@media print" in page and "break-inside: avoid" in page
    assert not re.findall(r'src="(?!data:)', page) and "url(" not in page and "<link" not in page
    assert page.index("is below zero-shot CLIP on a") < page.index("Results</h2>")
    assert "3 broken images dropped" in page and 'href="../data_check/check.html"' in page
    assert "10 classes" not in page and "5 classes" in page


def test_methods_and_thumbnails_on_the_page_are_bounded():
    names = ["zero_shot", "coop", "vpt", "maple", "clip_adapter", "all_in_one", "grouped"]
    counts = {"a": 100}
    averages = {name: method_result({"a": 0.1 * i}, {"a": 1.0}, counts, 0) for i, name in enumerate(names)}
    summary = Summary("x", ["a"], [["a"]], {}, averages, 1, 1, "", [], counts)
    assert shown_methods(summary) == ["grouped", "all_in_one", "clip_adapter", "zero_shot"]
    assert mistakes_per_task(6, 4) == run_page.MAX_MISTAKES
    for num_tasks in (10, 40, 150):
        assert num_tasks * 4 * mistakes_per_task(num_tasks, 4) <= run_page.MAX_THUMBNAILS


# --- what follows -----------------------------------------------------------------------------------------


def scores_with(correct: np.ndarray) -> TaskScores:
    return scores_of(np.zeros(len(correct), int), 1 - correct)


def test_average_differences_equal_their_definition():
    rng = np.random.default_rng(0)
    correct = {task: rng.integers(0, 2, (2, number)) for task, number in (("a", 40), ("b", 300), ("c", 7))}
    ours, baseline = ({task: scores_with(rows[row]) for task, rows in correct.items()} for row in (0, 1))
    estimate = average_difference(ours, baseline)
    value, variance = 0.0, 0.0
    for rows in correct.values():
        differences = [float(a) - float(b) for a, b in zip(*rows)]
        mean = sum(differences) / len(differences)
        value += mean / 3
        variance += sum((difference - mean) ** 2 for difference in differences) / len(differences) ** 2 / 9
    assert estimate == pytest.approx((value, variance**0.5), abs=1e-9)
    resampled = sum(
        (rows[0] - rows[1])[rng.integers(0, rows.shape[1], (4000, rows.shape[1]))].mean(1) / 3
        for rows in correct.values()
    )
    assert estimate.standard_error == pytest.approx(resampled.std(), rel=0.05)


FOUND, SINGLETONS, ONE_GROUP = [["a", "b"], ["c"]], [["a"], ["b"], ["c"]], [["a", "b", "c"]]
FOUND_NAME, IN_ONE, CHOSEN = "the groups found (a + b | c)", "all tasks in one group", "(the grouping's choice)"


def made_up_differences(error: float = 0.006, **accuracies: float) -> dict[str, dict[str, Estimate]]:
    """Differences of these accuracies, all with the same standard error."""
    return {
        name: {
            rival: Estimate(value - accuracies[rival], error * (value != accuracies[rival]))
            for rival in accuracies
            if rival != name
        }
        for name, value in accuracies.items()
        if name in STRATEGIES
    }


@pytest.mark.parametrize(
    ("accuracies", "groups", "recommended", "sentence"),
    [
        pytest.param(
            (0.7, 0.78, 0.761, 0.782), FOUND, "each_alone",
            f"Train each task alone: 1.9 ± 0.6 points above {IN_ONE}; "
            f"on a level with {FOUND_NAME}, -0.2 ± 0.6 points; 8.0 ± 0.6 points above zero-shot CLIP.",
            id="each alone, as the groups are on a level",
        ),
        pytest.param(
            (0.7, 0.76, 0.77, 0.79), FOUND, "grouped",
            f"Train {FOUND_NAME}: 3.0 ± 0.6 points above each task alone; 2.0 ± 0.6 points above {IN_ONE}; "
            "9.0 ± 0.6 points above zero-shot CLIP.",
            id="the groups",
        ),
        pytest.param(
            (0.7, 0.76, 0.763, 0.777), FOUND, "grouped",
            f"Train {FOUND_NAME}: 1.7 ± 0.6 points above each task alone; "
            f"1.4 ± 0.6 points above {IN_ONE}, which may be chance; 7.7 ± 0.6 points above zero-shot CLIP.",
            id="the groups, perhaps",
        ),
        pytest.param(
            (0.7, 0.74, 0.78, 0.75), FOUND, "all_in_one",
            f"Train {IN_ONE}: 4.0 ± 0.6 points above each task alone; 3.0 ± 0.6 points above {FOUND_NAME}; "
            "8.0 ± 0.6 points above zero-shot CLIP.",
            id="one group",
        ),
        pytest.param(
            (0.7, 0.7, 0.69, 0.703), FOUND, "zero_shot",
            "Train nothing and use zero-shot CLIP: equal to each task alone; "
            f"1.0 ± 0.6 points above {IN_ONE}, which may be chance; "
            f"on a level with {FOUND_NAME}, -0.3 ± 0.6 points.",
            id="nothing",
        ),
        pytest.param(
            (0.7, 0.78, 0.75, 0.78), SINGLETONS, "each_alone",
            f"Train each task alone {CHOSEN}: 3.0 ± 0.6 points above {IN_ONE}; "
            "8.0 ± 0.6 points above zero-shot CLIP.",
            id="groups of one task",
        ),
        pytest.param(
            (0.7, 0.76, 0.78, 0.78), ONE_GROUP, "all_in_one",
            f"Train {IN_ONE} {CHOSEN}: 2.0 ± 0.6 points above each task alone; "
            "8.0 ± 0.6 points above zero-shot CLIP.",
            id="one group found",
        ),
        pytest.param(
            (0.7, 0.79, 0.78, 0.78), ONE_GROUP, "each_alone",
            f"Train each task alone: 1.0 ± 0.6 points above {IN_ONE} {CHOSEN}, which may be chance; "
            "9.0 ± 0.6 points above zero-shot CLIP.",
            id="not the group found",
        ),
        pytest.param(
            (0.7, 0.78, 0.78, 0.78), [["a"]], "each_alone",
            "Train the task: 8.0 ± 0.6 points above zero-shot CLIP.",
            id="one task",
        ),
        pytest.param(
            (0.7, 0.78, 0.78, 0.76), None, "each_alone",
            f"Train each task alone: equal to {IN_ONE}; 2.0 ± 0.6 points above the groups found; "
            "8.0 ± 0.6 points above zero-shot CLIP.",
            id="groupings of several runs",
        ),
    ],
)  # fmt: skip
def test_the_simplest_training_that_none_exceeds_is_recommended(accuracies, groups, recommended, sentence):
    differences = made_up_differences(**dict(zip(STRATEGIES, accuracies)))
    assert recommended_strategy(differences, groups) == recommended
    assert recommendation(differences, groups) == sentence


def test_a_training_is_recommended_whatever_the_standard_errors():
    rng = np.random.default_rng(0)
    for _ in range(200):
        differences = made_up_differences(rng.random() / 50, **dict(zip(STRATEGIES, 0.7 + rng.random(4) / 50)))
        name = recommended_strategy(differences, FOUND)
        estimates = [differences[rival][name] for rival in STRATEGIES if rival != name]
        assert all(estimate.value <= estimate.standard_error for estimate in estimates)


@pytest.mark.parametrize(
    ("accuracy", "comparison"),
    [
        (0.84, "4.0 ± 0.6 points above that"),
        (0.799, "on a level with that, -0.1 ± 0.6 points"),
        (0.79, "1.0 ± 0.6 points below that, which may be chance"),
    ],
)
def test_the_best_other_method_is_compared_with_the_recommended(accuracy, comparison):
    accuracies = {"zero_shot": 0.7, "coop": 0.6, "clip_lora": accuracy, **dict.fromkeys(DEFAULT_VARIANTS, 0.7)}
    accuracies["each_alone"] = 0.8
    sentences = recommendation(made_up_differences(**accuracies), FOUND)
    assert sentences.startswith("Train each task alone: 10.0 ± 0.6 points above ")
    assert sentences.endswith(f"The best other method, CLIP-LoRA, is {comparison}.")


def test_many_groups_are_counted():
    groups = [[f"domain {number}", f"style {number}"] for number in range(40)]
    sentence = recommendation(made_up_differences(zero_shot=0.7, each_alone=0.7, all_in_one=0.7, grouped=0.8), groups)
    assert sentence.startswith("Train the groups found (40 groups): ")


def candidate(affinity: str, groups: list[list[str]], similarity: str | None = None) -> dict[str, object]:
    return {"affinity": affinity, "similarity": similarity, "groups": groups}


def test_the_groups_of_other_affinities_are_told():
    taken = candidate("transfer", FOUND)
    assert describe_candidates([taken]) == "Groups by transfer: a + b | c."
    candidates = [candidate("gradient", ONE_GROUP, "adam_cosine"), candidate("features", [["c"], ["b", "a"]])]
    assert describe_candidates([taken, *candidates]) == (
        "Groups by transfer: a + b | c. Gradient (adam cosine) would choose all tasks in one group; "
        "features would choose the same."
    )
    candidates = [candidate("gradient", SINGLETONS, "dot"), candidate("features", SINGLETONS)]
    assert describe_candidates([taken, *candidates]).endswith(
        " Gradient (dot) and features would choose each task alone."
    )


def made_up_summary(num_tasks: int) -> Summary:
    tasks = [f"task {number}" for number in range(num_tasks)]
    counts = dict.fromkeys(tasks, 1234)
    results = {
        name: method_result(dict.fromkeys(tasks, 0.775), dict.fromkeys(tasks, 1.0), counts, 99_999)
        for name in STRATEGIES
    }
    return Summary(
        "x", tasks, [tasks], {}, results, 1, 1, "", [], counts, conclusion="Train <all>.", grouping="By <a>."
    )


def test_all_outputs_have_the_same_sentences():
    summary = made_up_summary(2)
    console = Console(file=io.StringIO(), width=200)
    print_notes(SimpleNamespace(console=console), summary)
    scores = {name: {task: with_accuracy(3, 4) for task in summary.tasks} for name in STRATEGIES}
    page = unescape(run_page.run_page(summary, scores, {}, DETAILS))
    for text in (console.file.getvalue(), to_mlflow_description(summary), page):
        assert "Train <all>." in text and "By <a>." in text


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6, 30])
def test_the_table_fits_80_columns(num_tasks):
    console = Console(file=io.StringIO(), width=80)
    console.print(accuracy_table(made_up_summary(num_tasks)))
    table = console.file.getvalue()
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("77.5 ± 1.2") == 4 * (num_tasks + (num_tasks == 1)) and table.count("99,999") == 4
    assert "MmAP, each" in table


# --- next steps -------------------------------------------------------------------------------------------


def test_next_steps_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # an environment without our scripts
    run, images = "/runs/try #2/runs/x y-0", "/data/it's/a b"
    database, table = "sqlite:////runs/try #2/mlflow.db", "/#/experiments/7/runs"
    steps = next_steps(run, "my data (é)", "a task", [images], database, table)
    predict, serve, add_task, compare = (shlex.split(step.command) for step in steps)
    assert predict == [sys.executable, "-m", "jobs", "predict", run, images, "--task", "a task"]
    assert parse_models(serve[-1:]) == {"my-data": run}
    assert add_task[3:6] == ["add-task", "--run", run]
    assert compare[3:6] == ["ui", "--backend-store-uri", database]
    assert steps[3].url == f"http://127.0.0.1:5000{table}"
    assert all(line in format_next_steps(steps).splitlines() for line in (steps[0].command, steps[3].url))
    assert len(next_steps(run, "a", "b", [], "sqlite:////x.db", None)) == 3  # MLflow was not reached


def test_scripts_of_the_environment_are_called_by_name_or_path(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (script := tmp_path / "bin" / "mmap-clip").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_steps("r", "a", "t", [], "sqlite:///x", None)[0].command.startswith("bin/mmap-clip predict r")
    monkeypatch.setenv("PATH", str(script.parent))
    assert next_steps("r", "a", "t", [], "sqlite:///x", None)[0].command.startswith("mmap-clip predict r")


def test_a_server_is_opened_where_it_is():
    step = comparison_step("https://mlflow.example/", "/#/experiments/12/runs")
    assert not step.command and step.url == "https://mlflow.example/#/experiments/12/runs"
