"""The grouping study: scores of partitions, and other predictors, against their results after training."""

from __future__ import annotations

import csv
import io
import json
import re
from itertools import combinations
from math import isnan, nan, sqrt
from statistics import fmean, stdev

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import the_run
from reference_partitions import OBJECTIVES, all_partitions, reference_score

from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.partition import best_partition
from pipeline.grouping.study import (
    best_on_other_seeds,
    ceiling,
    mean_and_error,
    partition_score,
    set_partitions,
    study_grouping,
)
from pipeline.report.grouping_study import (
    pair_gains_figure,
    pair_gains_to_csv,
    study_figure,
    study_to_csv,
    study_to_html,
    study_to_markdown,
)
from pipeline.stages.global_prompt import SNAPSHOTS
from pipeline.training.snapshots import read_gradients

TASKS = ("ink", "neon", "chalk", "noise", "dots")
T = len(TASKS)
PARTITIONS = all_partitions(T)
AFFINITY_NAMES = ("transfer", "gradient dot")
HIGHER_IS_BETTER = {"accuracy": True, "test_loss": False}


def test_every_partition_is_enumerated_once():
    for num_tasks, bell in ((1, 1), (2, 2), (4, 15), (7, 877)):
        partitions = list(set_partitions(num_tasks))
        assert len(partitions) == len({frozenset(map(frozenset, groups)) for groups in partitions}) == bell
        assert all(
            sorted(task for group in groups for task in group) == list(range(num_tasks)) for groups in partitions
        )
        assert all(group == tuple(sorted(group)) for groups in partitions for group in groups)


@settings(max_examples=40, deadline=None)
@given(num_tasks=st.integers(1, 6), seed=st.integers(0, 10**6), objective=st.sampled_from(OBJECTIVES))
def test_the_highest_score_is_that_of_the_search(num_tasks, seed, objective):
    affinity = symmetric(np.random.default_rng(seed), num_tasks)
    best = best_partition(affinity, objective=objective)
    scores = {groups: partition_score(affinity, groups, objective) for groups in set_partitions(num_tasks)}
    assert scores[best.groups] == pytest.approx(best.score, abs=1e-12)
    assert max(scores.values()) == pytest.approx(best.score, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_has_the_reference_score(objective):
    affinity = symmetric(np.random.default_rng(7), T)
    for groups in PARTITIONS:
        expected = reference_score(affinity, groups, objective)
        assert partition_score(affinity, groups, objective) == pytest.approx(expected, abs=1e-12)


def symmetric(rng: np.random.Generator, num_tasks: int) -> np.ndarray:
    half = rng.normal(size=(num_tasks, num_tasks))
    return half + half.T


def random_inputs(seed: int):
    """Return affinities by name, and results by measure; accuracies have ties."""
    rng = np.random.default_rng(seed)
    groups = [group for size in range(1, T + 1) for group in combinations(range(T), size)]
    results = {
        "accuracy": {group: [round(float(value), 1) for value in rng.random(len(group))] for group in groups},
        "test_loss": {group: rng.random(len(group)).tolist() for group in groups},
    }
    return {name: symmetric(rng, T) for name in AFFINITY_NAMES}, results


# --- plain references ------------------------------------------------------------------------------------------------


def reference_results(results: dict) -> dict[tuple, float]:
    """Return partition → mean over its tasks."""
    return {groups: sum(sum(results[group]) for group in groups) / T for groups in PARTITIONS}


def reference_ranks(values: list[float]) -> list[float]:
    return [
        sum(rival < value for rival in values) + (sum(rival == value for rival in values) + 1) / 2 for value in values
    ]


def reference_correlation(x: list[float], y: list[float]) -> float:
    ranks = reference_ranks(x), reference_ranks(y)
    means = [sum(values) / len(values) for values in ranks]
    products = sum((a - means[0]) * (b - means[1]) for a, b in zip(*ranks))
    squares = [sum((value - mean) ** 2 for value in values) for values, mean in zip(ranks, means)]
    return products / sqrt(squares[0] * squares[1]) if squares[0] * squares[1] else nan


def reference_correlations(predictor: dict, results: dict, higher_is_better: bool) -> tuple[float, float]:
    quality = {groups: value if higher_is_better else -value for groups, value in results.items()}
    overall = reference_correlation([predictor[g] for g in PARTITIONS], [quality[g] for g in PARTITIONS])
    within = []
    for number in range(2, T):  # one group and T groups leave a single partition
        subset = [groups for groups in PARTITIONS if len(groups) == number]
        within.append(reference_correlation([predictor[g] for g in subset], [quality[g] for g in subset]))
    return overall, sum(within) / len(within)


@pytest.mark.parametrize("measure", HIGHER_IS_BETTER)
def test_the_study_is_that_of_plain_enumeration(measure):
    affinities, results = random_inputs(3)
    study = study_grouping(affinities, results)
    assert sorted(study.partitions) == sorted(PARTITIONS)
    expected = reference_results(results[measure])
    sign = 1 if HIGHER_IS_BETTER[measure] else -1
    for index, groups in enumerate(study.partitions):
        value = expected[groups]
        assert study.values[measure][index] == pytest.approx(value, abs=1e-9)
        assert study.fraction_better(measure, index) == pytest.approx(
            sum(sign * rival > sign * value + 1e-9 for rival in expected.values()) / len(expected), abs=1e-9
        )
        sizes = sorted(len(group) for group in groups)
        alike = [expected[partition] for partition in PARTITIONS if sorted(len(group) for group in partition) == sizes]
        assert study.random_of_sizes(measure, index) == pytest.approx(sum(alike) / len(alike), abs=1e-9)
    assert study.random(measure) == pytest.approx(sum(expected.values()) / len(expected), abs=1e-9)
    assert study.partitions[study.all_in_one] == ((0, 1, 2, 3, 4),)
    assert study.partitions[study.each_alone] == ((0,), (1,), (2,), (3,), (4,))
    best = max(expected.values()) if HIGHER_IS_BETTER[measure] else min(expected.values())
    assert expected[study.partitions[study.best(measure)]] == pytest.approx(best, abs=1e-9)

    criteria = [(criterion.affinity, criterion.objective) for criterion in study.criteria]
    assert criteria == [(name, objective) for name in AFFINITY_NAMES for objective in OBJECTIVES]
    for criterion in study.criteria:
        scores = {
            groups: reference_score(affinities[criterion.affinity], groups, criterion.objective)
            for groups in PARTITIONS
        }
        assert criterion.scores.tolist() == pytest.approx([scores[groups] for groups in study.partitions], abs=1e-9)
        assert study.partitions[criterion.chosen] == max(scores, key=scores.get)
        ours = study.correlations(criterion.scores, measure)
        rounded = {groups: round(value, 9) for groups, value in expected.items()}  # equal accuracies are equal
        assert ours == pytest.approx(reference_correlations(scores, rounded, HIGHER_IS_BETTER[measure]), abs=1e-9)


@pytest.mark.parametrize("measure", HIGHER_IS_BETTER)
def test_pairs_are_compared_with_training_alone(measure):
    affinities, results = random_inputs(4)
    study, by_group = study_grouping(affinities, results), results[measure]

    def result_with(task: int, mate: int) -> float:
        pair = tuple(sorted((task, mate)))
        return by_group[pair][pair.index(task)]

    for task in range(T):
        assert isnan(study.pair_gains[measure][task, task])
        for mate in set(range(T)) - {task}:
            change = result_with(task, mate) - by_group[task,][0]
            gain = change if HIGHER_IS_BETTER[measure] else -change
            assert study.pair_gains[measure][mate, task] == pytest.approx(gain, abs=1e-9)
    for groups, estimate in zip(study.partitions, study.pair_estimates[measure]):
        estimates = []
        for group in groups:
            for task in group:
                mates = [result_with(task, mate) for mate in group if mate != task]
                estimates.append(sum(mates) / len(mates) if mates else by_group[task,][0])
        assert estimate == pytest.approx(sum(estimates) / T, abs=1e-9)


@pytest.mark.parametrize("num_seeds", [2, 4])
def test_the_ceiling_is_the_correlation_of_other_seeds(num_seeds):
    inputs = [random_inputs(seed) for seed in range(num_seeds)]
    studies = [study_grouping(*values) for values in inputs]
    expected = [reference_results(results["test_loss"]) for _, results in inputs]
    by_pair = {
        (i, j): reference_correlations({g: -value for g, value in expected[i].items()}, expected[j], False)
        for i, j in combinations(range(num_seeds), 2)
    }
    for position, (mean, error) in enumerate(ceiling(studies, "test_loss")):
        assert mean == pytest.approx(fmean(values[position] for values in by_pair.values()), abs=1e-9)
        if num_seeds == 2:
            assert isnan(error)
            continue
        left_out = [
            fmean(values[position] for pair, values in by_pair.items() if seed not in pair) for seed in range(num_seeds)
        ]
        variance = sum((value - fmean(left_out)) ** 2 for value in left_out) * (num_seeds - 1) / num_seeds
        assert error == pytest.approx(sqrt(variance), abs=1e-9)

    for seed, index in enumerate(best_on_other_seeds(studies, "test_loss")):
        remaining = [results for number, results in enumerate(expected) if number != seed]
        lowest = min(PARTITIONS, key=lambda groups: sum(results[groups] for results in remaining))
        assert studies[seed].partitions[index] == lowest


def test_means_have_standard_errors():
    values = [1.0, 2.5, 4.0, -1.0]
    assert mean_and_error(values) == pytest.approx((fmean(values), stdev(values) / 2))
    assert mean_and_error([3.0])[0] == 3 and isnan(mean_and_error([3.0])[1])


def test_a_perfect_affinity_has_correlation_one():
    affinity = symmetric(np.random.default_rng(1), T)
    groups = [group for size in range(1, T + 1) for group in combinations(range(T), size)]
    losses = {g: [1 - sum(affinity[task, mate] for mate in g if mate != task) for task in g] for g in groups}
    accuracies = {g: [-loss for loss in group_losses] for g, group_losses in losses.items()}
    study = study_grouping({"perfect": affinity}, {"accuracy": accuracies, "test_loss": losses})
    (perfect,) = [criterion for criterion in study.criteria if criterion.objective == "sum"]
    for measure in HIGHER_IS_BETTER:
        assert study.correlations(perfect.scores, measure) == pytest.approx((1, 1))
        assert perfect.chosen == study.best(measure) and study.fraction_better(measure, perfect.chosen) == 0


# --- report ----------------------------------------------------------------------------------------------------------

SEEDS = (1, 2, 5)


@pytest.fixture(scope="module")
def studies():
    return {seed: study_grouping(*random_inputs(seed)) for seed in SEEDS}


def table_rows(markdown: str, title: str) -> dict[str, list[str]]:
    """Return the rows of the table in a section: first cell → other cells."""
    section = markdown.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row[1:] for row in cells}


def shown(values: list[float], digits: int) -> str:
    text = f"{fmean(values):.{digits}f} ± {stdev(values) / sqrt(len(values)):.{digits}f}"
    return text.replace("-", "−")


def test_the_report_compares_what_each_criterion_chooses(studies):
    text = study_to_markdown("demo", TASKS, studies, "transfer, sum")
    for measure, title, scale, digits in (("accuracy", "Test accuracy", 100, 2), ("test_loss", "Test loss", -1, 3)):
        rows = table_rows(text, title)
        criteria = [f"{name}, {objective}" for name in AFFINITY_NAMES for objective in OBJECTIVES]
        baselines = ["all in one", "each alone", "random partition", "best in hindsight", "best on the other seeds"]
        header, rule, *titles = rows
        assert titles == [*baselines, *criteria]
        other_seeds = best_on_other_seeds(list(studies.values()), measure)
        for number, name in enumerate(["all in one", "best on the other seeds", *criteria]):
            values, gains, better = [], [], []
            for seed_number, study in enumerate(studies.values()):
                index = (study.all_in_one, other_seeds[seed_number])[number] if number < 2 else 0
                if number >= 2:
                    index = study.criteria[number - 2].chosen
                results = study.values[measure]
                references = (study.all_in_one, study.each_alone, study.best(measure))
                of_all, alone, best = (scale * (results[index] - results[reference]) for reference in references)
                random = scale * (results[index] - results.mean())
                same_sizes = scale * (results[index] - study.random_of_sizes(measure, index))
                values.append(abs(scale) * results[index])
                gains.append([of_all, alone, random, same_sizes, best])
                better.append(100 * study.fraction_better(measure, index))
            expected = [shown(values, digits), *(shown(list(column), digits) for column in zip(*gains))]
            assert rows[name] == [re.sub(r"^−(0\.0+) ", r"\1 ", cell) for cell in expected] + [shown(better, 0)]
        zero = f"{0:.{digits}f} ± {0:.{digits}f}"
        assert rows["random partition"][3:5] == rows["each alone"][2:5:2] == [zero, zero]


def test_the_report_says_what_follows():
    """Its sentence is about the groups of the config's affinity and objective."""
    affinities, results = random_inputs(1)
    groups = [group for size in range(1, T + 1) for group in combinations(range(T), size)]
    results["accuracy"] = {group: [0.9 if group in ((0, 1), (2, 3, 4)) else 0.5] * len(group) for group in groups}
    right = np.array([[1.0 if (i < 2) == (j < 2) else -1.0 for j in range(T)] for i in range(T)])
    studies = {seed: study_grouping({"transfer": right, "features": -right}, results) for seed in SEEDS}
    introduction = study_to_markdown("demo", TASKS, studies, "transfer, sum").split("## ")[0]
    assert (
        "(transfer, sum): Train the groups found: 40.0 ± 0.0 points above each task alone; 40.0 ± 0.0" in introduction
    )
    introduction = study_to_markdown("demo", TASKS, studies, "features, sum").split("## ")[0]
    assert "(features, sum): Train each task alone" in introduction
    assert "Train" not in study_to_markdown("demo", TASKS, {1: studies[1]}, "transfer, sum")  # no error of one seed


def test_the_report_has_correlations_beside_their_ceiling(studies):
    text = study_to_markdown("demo", TASKS, studies, "transfer, sum")
    rows = table_rows(text, "Rank correlation")
    seed_studies = list(studies.values())
    predictors = {
        "number of groups": lambda study, sign, measure: study.num_groups,
        "results of all pairs": lambda study, sign, measure: sign * study.pair_estimates[measure],
        "gradient dot, mean": lambda study, sign, measure: study.criteria[4].scores,
    }
    assert [(c.affinity, c.objective) for c in seed_studies[0].criteria][4] == ("gradient dot", "mean")
    for name, predictor in predictors.items():
        cells = []
        for measure, sign in (("accuracy", 1), ("test_loss", -1)):
            values = [study.correlations(predictor(study, sign, measure), measure) for study in seed_studies]
            cells += ["undefined" if isnan(v[0]) else shown(list(v), 2) for v in zip(*values)]
        assert rows[name] == cells
    assert rows["number of groups"][1] == rows["number of groups"][3] == "undefined"
    ceilings = [value for measure in ("accuracy", "test_loss") for value in ceiling(seed_studies, measure)]
    assert rows["another seed of the results"] == [f"{m:.2f} ± {e:.2f}".replace("-", "−") for m, e in ceilings]
    assert "another seed" not in study_to_markdown("demo", TASKS, {1: studies[1]}, "transfer, sum")


def test_the_report_has_gains_of_pairs_and_chosen_groups(studies):
    text = study_to_markdown("demo", TASKS, studies, "transfer, sum")
    gains = [100 * study.pair_gains["accuracy"][1, 3] for study in studies.values()]
    row = table_rows(text, "Test accuracy: gains of pairs")["with neon"]
    assert row[3] == shown(gains, 1) and row[1] == ""
    chosen = studies[2].partitions[studies[2].criteria[0].chosen]
    names = " \\| ".join(" + ".join(TASKS[task] for task in group) for group in chosen)
    assert re.search(rf"^\| transfer, sum \| [\d, ]*\b2\b[\d, ]* \| {re.escape(names)} \|$", text, re.MULTILINE)
    page = study_to_html("a <b>", TASKS, studies, "transfer, sum", {"grouping_study.png": b"1", "pair_gains.png": b"2"})
    assert "a &lt;b&gt;" in page and page.count("<table>") == 6 and shown(gains, 1) in page


def test_tables_as_data(studies):
    rows = list(csv.DictReader(io.StringIO(study_to_csv(TASKS, studies))))
    assert len(rows) == len(SEEDS) * len(PARTITIONS)
    row, study, index = rows[len(PARTITIONS) + 7], studies[2], 7
    groups = " | ".join(" + ".join(TASKS[task] for task in group) for group in study.partitions[index])
    assert (row["seed"], row["groups"]) == ("2", groups)
    for measure in HIGHER_IS_BETTER:
        assert float(row[measure]) == study.values[measure][index]
    assert float(row["gradient dot, density"]) == study.criteria[5].scores[index]
    pairs = list(csv.DictReader(io.StringIO(pair_gains_to_csv(TASKS, studies))))
    assert len(pairs) == len(SEEDS) * T * (T - 1)
    (pair,) = [p for p in pairs if (p["seed"], p["task"], p["with"]) == ("5", "chalk", "ink")]
    assert float(pair["gain in test_loss"]) == studies[5].pair_gains["test_loss"][0, 2]


@pytest.mark.parametrize("seeds", [SEEDS, SEEDS[:1]], ids=["three seeds", "one seed"])
def test_figures_show_every_criterion_and_pair(studies, seeds):
    selected = {seed: studies[seed] for seed in seeds}
    figure = study_figure(selected)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [f"{name}, {objective}" for name in AFFINITY_NAMES for objective in OBJECTIVES] == labels[-6:]
    texts = [text.get_text() for text in pair_gains_figure(TASKS, selected).axes[1].texts]
    gains = [studies[seed].pair_gains["test_loss"][0, 1] for seed in seeds]
    expected = shown(gains, 3).replace(" ± ", "\n± ") if len(seeds) > 1 else f"{gains[0]:.3f}".replace("-", "−")
    assert len(texts) == T * (T - 1) and texts[0] == expected


def test_constant_results_have_no_correlation():
    affinities, results = random_inputs(1)
    constant = {measure: {group: [0.5] * len(group) for group in results[measure]} for measure in results}
    studies = {seed: study_grouping(affinities, constant) for seed in (1, 2)}
    rows = table_rows(study_to_markdown("demo", TASKS, studies, "transfer, sum"), "Rank correlation")
    assert rows["transfer, sum"] == rows["another seed of the results"] == ["undefined"] * 4
    assert study_figure(studies) and pair_gains_figure(TASKS, studies)


@pytest.mark.slow
def test_the_study_trains_every_group(run_job, tmp_path):
    tasks = ("--data.tasks", "[blur_right, ink_left, ink_right]")
    quick = ("--training.epochs", "1", "--global_prompt.epochs", "1", *tasks)
    storage = tmp_path / "storage"
    finished = run_job("grouping_study", "--storage", storage, *quick, "--seeds", "1")
    assert finished.status == 0, finished.output
    assert "3 tasks for 1 seed: 7 trainings per seed, 7 in all" in finished.output
    groups = {
        tuple(json.loads(file.read_text())["inputs"]["group"]): json.loads((file.parent / "result.json").read_text())
        for file in (storage / "group_trainings").glob("[!.]*/artifact.json")
    }
    assert len(groups) == 7  # each task alone is also what transfer needs
    (folder,) = (storage / "grouping_studies").iterdir()
    for name in ("grouping_study.png", "grouping_study.html", "pair_gains.svg"):
        assert (folder / name).stat().st_size > 5000
    rows = {row["groups"]: row for row in csv.DictReader((folder / "grouping_study.csv").open())}
    assert len(rows) == 5
    for measure in ("accuracy", "test_loss"):
        measured = [groups["blur_right", "ink_right"][measure][task] for task in ("blur_right", "ink_right")]
        measured.append(groups["ink_left",][measure]["ink_left"])
        assert float(rows["blur_right + ink_right | ink_left"][measure]) == pytest.approx(sum(measured) / 3)
    check_scores_of_pairs(rows, storage)
    pairs = list(csv.DictReader((folder / "pair_gains.csv").open()))
    (pair,) = [row for row in pairs if (row["task"], row["with"]) == ("ink_left", "blur_right")]
    gain = groups["ink_left",]["test_loss"]["ink_left"] - groups["blur_right", "ink_left"]["test_loss"]["ink_left"]
    assert float(pair["gain in test_loss"]) == pytest.approx(gain)
    assert the_run(storage).is_dir()

    single_task = run_job("grouping_study", "--storage", storage, "--data.tasks", "[blur_right]")
    assert (
        single_task.status == 2 and "a study of 1 task takes 1 training per seed; choose 2 to 8" in single_task.output
    )


def check_scores_of_pairs(rows: dict[str, dict[str, str]], storage) -> None:
    """The scores under `sum` of partitions into a pair and a single task are the pairs' affinities."""
    tasks = ["blur_right", "ink_left", "ink_right"]
    (file,) = (storage / "global_prompt").glob("[!.]*/" + SNAPSHOTS)
    gradients = read_gradients(file, tasks)
    expected = {f"gradient {name}": affinity_matrix(gradients, name) for name in ("dot", "cosine", "adam_cosine")}
    losses = {
        json.loads((file.parent / "artifact.json").read_text())["inputs"]["prompts_of"]: pq.read_table(file).to_pandas()
        for file in (storage / "single_tasks").glob("[!.]*/losses.parquet")
    }
    mean_losses = {prompts_of: table.groupby("task")["loss"].mean() for prompts_of, table in losses.items()}
    gains = np.array([[mean_losses[None][task] - mean_losses[mate][task] for task in tasks] for mate in tasks])
    expected["transfer"] = (gains + gains.T) / 2
    centroids = (
        losses[None]
        .groupby(["task", "label"])["features"]
        .apply(lambda features: np.mean([row / np.linalg.norm(row) for row in features], axis=0))
    )
    centered = np.stack([np.mean(list(centroids[task]), axis=0) for task in tasks])
    centered -= centered.mean(axis=0)
    unit = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    expected["features"] = unit @ unit.T
    for i, j in combinations(range(3), 2):
        pair, single = [tasks[i], tasks[j]], tasks[3 - i - j]
        groups = [" + ".join(pair), single]
        row = rows[" | ".join(sorted(groups, key=lambda group: tasks.index(group.split(" ")[0])))]
        for name, affinity in expected.items():
            assert float(row[f"{name}, sum"]) == pytest.approx(affinity[i, j], rel=1e-5)  # features are float32
