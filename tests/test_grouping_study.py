"""The grouping study: partitions' scores against their accuracies after training."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import the_run
from reference_partitions import (
    OBJECTIVES,
    REFERENCE_AFFINITIES,
    SIMILARITY_NAMES,
    all_partitions,
    reference_rms,
    reference_score,
)

from pipeline.grouping.affinity import affinity_matrix
from pipeline.grouping.partition import best_partition
from pipeline.grouping.study import CRITERIA, partition_score, set_partitions, study_grouping
from pipeline.report.grouping_study import study_figure, study_to_csv, study_to_markdown

TASKS = ("ink", "neon", "chalk", "noise")


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
    half = np.random.default_rng(seed).normal(size=(num_tasks, num_tasks))
    affinity = half + half.T
    best = best_partition(affinity, objective=objective)
    scores = {groups: partition_score(affinity, groups, objective) for groups in set_partitions(num_tasks)}
    assert scores[best.groups] == pytest.approx(best.score, abs=1e-12)
    assert max(scores.values()) == pytest.approx(best.score, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_has_the_reference_score(objective):
    half = np.random.default_rng(7).normal(size=(5, 5))
    for groups in all_partitions(5):
        expected = reference_score(half + half.T, groups, objective)
        assert partition_score(half + half.T, groups, objective) == pytest.approx(expected, abs=1e-12)


def reference_affinity(gradients: np.ndarray, kind: str) -> np.ndarray:
    pair, rms = REFERENCE_AFFINITIES[kind], reference_rms(gradients)
    tasks = range(gradients.shape[1])
    return np.mean(
        [[[pair(snapshot[i], snapshot[j], rms) for j in tasks] for i in tasks] for snapshot in gradients], axis=0
    )


def test_each_criterion_has_its_own_scores():
    """All criteria choose different partitions of these gradients, so that none can be mistaken for another."""
    excluded = {"density"}  # in between
    assert CRITERIA == tuple((kind, name) for kind in SIMILARITY_NAMES for name in OBJECTIVES if name not in excluded)
    partitions = list(all_partitions(4))
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        gradients = rng.normal(size=(10, 4, 6)) * rng.uniform(0.2, 5, size=(10, 4, 1))
        affinities = {kind: reference_affinity(gradients, kind) for kind in SIMILARITY_NAMES}
        scores = {
            (kind, objective): [reference_score(affinities[kind], groups, objective) for groups in partitions]
            for kind, objective in CRITERIA
        }
        chosen = {criterion: partitions[int(np.argmax(values))] for criterion, values in scores.items()}
        if len(set(chosen.values())) == len(CRITERIA):
            break
    else:
        pytest.fail("no gradients tell the criteria apart")
    accuracies_by_group = {group: rng.random(len(group)) for groups in partitions for group in groups}
    accuracies = [sum(sum(accuracies_by_group[group]) for group in groups) / 4 for groups in partitions]

    study = study_grouping(gradients, accuracies_by_group)
    assert sorted(study.partitions) == sorted(partitions)
    indices = [partitions.index(groups) for groups in study.partitions]
    assert study.accuracies == pytest.approx([accuracies[index] for index in indices])
    assert [(outcome.affinity, outcome.objective) for outcome in study.criteria] == list(CRITERIA)
    for outcome in study.criteria:
        criterion = (outcome.affinity, outcome.objective)
        assert outcome.scores == pytest.approx([scores[criterion][index] for index in indices])
        assert outcome.chosen == chosen[criterion]
        assert outcome.accuracy == pytest.approx(accuracies[partitions.index(outcome.chosen)])
        assert outcome.fraction_better == sum(accuracy > outcome.accuracy for accuracy in accuracies) / 15
        assert outcome.rank_correlation == pytest.approx(scipy.stats.spearmanr(scores[criterion], accuracies).statistic)
        late_affinity = reference_affinity(gradients[2:], outcome.affinity)
        late_scores = [reference_score(late_affinity, groups, outcome.objective) for groups in partitions]
        assert outcome.late_correlation == pytest.approx(scipy.stats.spearmanr(late_scores, accuracies).statistic)

    names = {f"{kind} {objective}": (kind, objective) for kind, objective in CRITERIA}
    texts = [" | ".join(" + ".join(TASKS[task] for task in group) for group in groups) for groups in partitions]
    for row in csv.DictReader(io.StringIO(study_to_csv(TASKS, {1: study}))):
        index = texts.index(row["groups"])
        assert float(row["accuracy"]) == pytest.approx(accuracies[index])
        for name, criterion in names.items():
            assert float(row[name]) == pytest.approx(scores[criterion][index])
    text = study_to_markdown("demo", TASKS, {1: study})
    for kind, objective in CRITERIA:
        assert f"- seed 1, `{kind}`, `{objective}`: {texts[partitions.index(chosen[kind, objective])]}" in text
        correlation = f"{scipy.stats.spearmanr(scores[kind, objective], accuracies).statistic:.2f}".replace("-", "−")
        assert f"| `{kind}`, `{objective}` | {correlation} |" in text
        accuracy = 100 * accuracies[partitions.index(chosen[kind, objective])]
        assert f"| chosen by `{kind}`, `{objective}` | {accuracy:.2f} |" in text


def synthetic_study(seed: int, noise: float):
    """Accuracies are a function of the dot-product affinity within a group, plus noise."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(3, 4, 10))
    affinity = affinity_matrix(gradients, "dot")
    accuracies_by_group = {
        group: [
            0.5 + sum(affinity[task, peer] for peer in group if peer != task) / 400 + noise * rng.normal()
            for task in group
        ]
        for groups in set_partitions(4)
        for group in groups
    }
    return study_grouping(gradients, accuracies_by_group), accuracies_by_group


def test_a_perfect_criterion_has_correlation_one():
    study, accuracies_by_group = synthetic_study(1, noise=0)
    dot_sum = study.criteria[CRITERIA.index(("dot", "sum"))]
    assert dot_sum.rank_correlation == dot_sum.same_num_groups_correlation == pytest.approx(1)
    assert dot_sum.late_correlation == pytest.approx(1)  # a fifth of three snapshots is none
    assert dot_sum.accuracy == max(study.accuracies) and dot_sum.fraction_better == 0
    assert study.single_group == pytest.approx(sum(accuracies_by_group[0, 1, 2, 3]) / 4)
    assert study.all_singletons == pytest.approx(sum(accuracies_by_group[task,][0] for task in range(4)) / 4)
    assert study.random == pytest.approx(np.mean(study.accuracies))


def test_correlations_of_equally_many_groups_and_of_later_snapshots():
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(10, 4, 6))
    accuracies_by_group = {group: rng.random(len(group)) for groups in set_partitions(4) for group in groups}
    study = study_grouping(gradients, accuracies_by_group)
    late = affinity_matrix(gradients[2:], "cosine")
    outcome = study.criteria[CRITERIA.index(("cosine", "mean"))]
    scores = [partition_score(late, groups, "mean") for groups in study.partitions]
    assert outcome.late_correlation == pytest.approx(scipy.stats.spearmanr(scores, study.accuracies).statistic)
    correlations = [
        scipy.stats.spearmanr(*zip(*pairs)).statistic
        for number in (2, 3)  # one or four groups leave a single partition
        if (
            pairs := [
                (score, accuracy)
                for groups, score, accuracy in zip(study.partitions, outcome.scores, study.accuracies)
                if len(groups) == number
            ]
        )
    ]
    assert outcome.same_num_groups_correlation == pytest.approx(np.mean(correlations))


def test_report():
    studies = {seed: synthetic_study(seed, noise=0.01)[0] for seed in (1, 2, 3)}
    text = study_to_markdown("demo", TASKS, studies)
    gains = [100 * (study.criteria[0].accuracy - study.single_group) for study in studies.values()]
    expected = f"{np.mean(gains):.2f} ± {np.std(gains, ddof=1) / 3**0.5:.2f}".replace("-", "−")
    (row,) = [line for line in text.splitlines() if line.startswith("| chosen by `dot`, `sum`")]
    assert row.split(" | ")[2] == expected
    rows = list(csv.DictReader(io.StringIO(study_to_csv(TASKS, studies))))
    assert len(rows) == 3 * 15
    assert float(rows[0]["cosine mean"]) == studies[1].criteria[CRITERIA.index(("cosine", "mean"))].scores[0]
    assert rows[0]["groups"] == "ink + neon + chalk + noise"
    figure = study_figure(studies)
    assert len(figure.axes) == 3 * len(CRITERIA)
    for axes, outcome in zip(figure.axes, studies[1].criteria):
        assert f"{outcome.rank_correlation:.2f}".replace("-", "−") in axes.texts[0].get_text()


def test_constant_accuracies_have_no_correlation():
    gradients = np.random.default_rng(1).normal(size=(3, 4, 10))
    same = {group: [0.5] * len(group) for groups in set_partitions(4) for group in groups}
    studies = {seed: study_grouping(gradients, same) for seed in (1, 2)}
    assert study_to_markdown("demo", TASKS, studies).count("undefined") >= 4
    assert len(study_figure(studies).axes) == 2 * len(CRITERIA)


@pytest.mark.slow
def test_the_study_trains_every_group(run_job, tmp_path):
    quick = ("--training.epochs", "1", "--global_prompt.epochs", "1", "--data.tasks", "[ink, neon, noise]")
    storage = tmp_path / "storage"
    finished = run_job("grouping_study", "--storage", storage, *quick, "--seeds", "1")
    assert finished.status == 0, finished.output
    groups = {
        tuple(json.loads(file.read_text())["inputs"]["group"]): json.loads((file.parent / "result.json").read_text())
        for file in (storage / "group_trainings").glob("[!.]*/artifact.json")
    }
    assert len(groups) == 7
    (folder,) = (storage / "grouping_studies").iterdir()
    assert (folder / "grouping_study.png").stat().st_size > 5000
    rows = {row["groups"]: float(row["accuracy"]) for row in csv.DictReader((folder / "grouping_study.csv").open())}
    assert len(rows) == 5
    measured = [groups["ink", "noise"]["accuracy"][task] for task in ("ink", "noise")]
    measured.append(groups["neon",]["accuracy"]["neon"])
    assert rows["ink + noise | neon"] == pytest.approx(sum(measured) / 3)
    assert the_run(storage).is_dir()

    single_task = run_job("grouping_study", "--storage", storage, "--data.tasks", "[ink]")
    assert (
        single_task.status == 2 and "a study of 1 task takes 1 training per seed; choose 2 to 8" in single_task.output
    )
