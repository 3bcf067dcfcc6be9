"""The grouping study as Markdown, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import isnan
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np

from pipeline.grouping.study import CRITERIA, GroupingStudy
from pipeline.grouping.text import format_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, BLACK = "#0072b2", "#d55e00", "#000000"


def study_to_markdown(name: str, tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """Return a report of the studies (by seed): means over seeds, ± standard error for two or more seeds."""
    seed_studies = list(studies.values())
    lines = [
        f"# {name}: do scores predict accuracy?",
        "",
        f"All {len(seed_studies[0].partitions)} partitions of {len(tasks)} tasks, from {2 ** len(tasks) - 1} trainings "
        f"per seed; seeds {', '.join(map(str, studies))}. Accuracies are means over tasks in %, gains in points.",
        "",
        "| groups | accuracy | gain over a single group | gain over a random partition | better partitions |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, accuracies in {
        "single group": [study.single_group for study in seed_studies],
        "one group per task": [study.all_singletons for study in seed_studies],
        "random partition": [study.random for study in seed_studies],
        "best partition in hindsight": [max(study.accuracies) for study in seed_studies],
    }.items():
        lines.append(f"| {label} | {_gains(accuracies, seed_studies)} | |")
    for index, (kind, objective) in enumerate(CRITERIA):
        outcomes = [study.criteria[index] for study in seed_studies]
        cells = [
            _gains([outcome.accuracy for outcome in outcomes], seed_studies),
            f"{100 * fmean(outcome.fraction_better for outcome in outcomes):.0f} %",
        ]
        lines.append(f"| chosen by `{kind}`, `{objective}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Rank correlation (Spearman) of scores and accuracies: over all partitions; among partitions with equally many "
        "groups; over all partitions, without the first fifth of the snapshots.",
        "",
        "| score | all partitions | equally many groups | without early snapshots |",
        "| --- | ---: | ---: | ---: |",
    ]
    for index, (kind, objective) in enumerate(CRITERIA):
        outcomes = [study.criteria[index] for study in seed_studies]
        cells = [
            _spread([getattr(outcome, name) for outcome in outcomes])
            for name in ("rank_correlation", "same_num_groups_correlation", "late_correlation")
        ]
        lines.append(f"| `{kind}`, `{objective}` | {' | '.join(cells)} |")
    lines += ["", "Chosen groups:", ""]
    for seed, study in studies.items():
        for outcome in study.criteria:
            groups = format_groups(outcome.chosen, tasks)
            lines.append(f"- seed {seed}, `{outcome.affinity}`, `{outcome.objective}`: {groups}")
    return "\n".join([*lines, "", "![scores against accuracies](grouping_study.png)", ""])


def study_to_csv(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """Return one row per partition and seed: groups, accuracy (0 to 1), and the score by every criterion."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["seed", "groups", "accuracy", *(f"{kind} {objective}" for kind, objective in CRITERIA)])
    for seed, study in studies.items():
        scores = zip(*(outcome.scores for outcome in study.criteria))
        for groups, accuracy, partition_scores in zip(study.partitions, study.accuracies, scores):
            writer.writerow([seed, format_groups(groups, tasks), accuracy, *partition_scores])
    return stream.getvalue()


def study_figure(studies: Mapping[int, GroupingStudy]) -> Figure:
    """Plot score against accuracy of every partition: a row per seed, a column per criterion. The chosen partition and
    the single group are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(CRITERIA) + 0.6, 2.3 * len(studies) + 0.7), layout="constrained")
    panels = figure.subplots(len(studies), len(CRITERIA), squeeze=False, sharey="row")
    for row, (seed, study) in zip(panels, studies.items()):
        single = next(index for index, groups in enumerate(study.partitions) if len(groups) == 1)
        accuracies = 100 * np.array(study.accuracies)
        for axes, outcome in zip(row, study.criteria):
            chosen = study.partitions.index(outcome.chosen)
            axes.scatter(outcome.scores, accuracies, s=9, color=BLUE, alpha=0.45, linewidths=0)
            axes.scatter(
                outcome.scores[single], accuracies[single], s=46, marker="s", color=BLACK, label="single group"
            )
            axes.scatter(outcome.scores[chosen], accuracies[chosen], s=34, color=VERMILION, label="chosen", zorder=3)
            axes.annotate(
                f"ρ = {outcome.rank_correlation:.2f}".replace("-", "−"),
                (0.04, 0.04),
                xycoords="axes fraction",
                fontsize=9,
            )
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"seed {seed}", fontsize=10)
    for axes, (kind, objective) in zip(panels[0], CRITERIA):
        axes.set_title(f"{kind}, {objective}", fontsize=10)
    figure.supxlabel("score of the partition", fontsize=10)
    figure.supylabel("test accuracy (%), mean over tasks", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _gains(accuracies: Sequence[float], studies: Sequence[GroupingStudy]) -> str:
    references = ([study.single_group for study in studies], [study.random for study in studies])
    gains = [[100 * (ours - theirs) for ours, theirs in zip(accuracies, reference)] for reference in references]
    return " | ".join([_spread([100 * accuracy for accuracy in accuracies]), *map(_spread, gains)])


def _spread(values: Sequence[float]) -> str:
    if any(map(isnan, values)):
        return "undefined"  # correlation with constant accuracies
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{error}".replace("-", "−")
