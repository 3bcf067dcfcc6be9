"""The grouping study as Markdown, CSV and a picture."""

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
    """`studies` by seed. Means over seeds ± standard error, where there are two seeds or more."""
    of_seeds = list(studies.values())
    lines = [
        f"# {name}: does the score tell which groups are good?",
        "",
        f"All {len(of_seeds[0].partitions)} partitions of {len(tasks)} tasks, from {2 ** len(tasks) - 1} trainings a "
        f"seed; seeds {', '.join(map(str, studies))}. Accuracies are means over tasks in %, gains in points.",
        "",
        "| groups | accuracy | over all in one | over a random partition | partitions better |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label, accuracies in {
        "all in one": [of.single_group for of in of_seeds],
        "each alone": [of.all_singletons for of in of_seeds],
        "a random partition": [of.random for of in of_seeds],
        "best, known only afterwards": [max(of.accuracies) for of in of_seeds],
    }.items():
        lines.append(f"| {label} | {_gains(accuracies, of_seeds)} | |")
    for number, (kind, objective) in enumerate(CRITERIA):
        outcomes = [of.criteria[number] for of in of_seeds]
        cells = [
            _gains([outcome.accuracy for outcome in outcomes], of_seeds),
            f"{100 * fmean(outcome.fraction_better for outcome in outcomes):.0f} %",
        ]
        lines.append(f"| found by `{kind}`, `{objective}` | {' | '.join(cells)} |")
    lines += [
        "",
        "Rank correlation of scores and accuracies: over all partitions; among those with equally many groups; over "
        "all with the snapshots after the first fifth alone.",
        "",
        "| score | all partitions | equally many groups | later snapshots |",
        "| --- | ---: | ---: | ---: |",
    ]
    for number, (kind, objective) in enumerate(CRITERIA):
        outcomes = [of.criteria[number] for of in of_seeds]
        cells = [
            _spread([getattr(outcome, name) for outcome in outcomes])
            for name in ("rank_correlation", "same_num_groups_correlation", "late_correlation")
        ]
        lines.append(f"| `{kind}`, `{objective}` | {' | '.join(cells)} |")
    lines += ["", "Found groups:", ""]
    for seed, of_seed in studies.items():
        for outcome in of_seed.criteria:
            groups = format_groups(outcome.chosen, tasks)
            lines.append(f"- seed {seed}, `{outcome.affinity}`, `{outcome.objective}`: {groups}")
    return "\n".join([*lines, "", "![scores against accuracies](grouping_study.png)", ""])


def study_to_csv(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """A row a partition and seed: its groups, accuracy (0 to 1), and score by every criterion."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["seed", "groups", "accuracy", *(f"{kind} {objective}" for kind, objective in CRITERIA)])
    for seed, of_seed in studies.items():
        scores = zip(*(outcome.scores for outcome in of_seed.criteria))
        for groups, accuracy, of_partition in zip(of_seed.partitions, of_seed.accuracies, scores):
            writer.writerow([seed, format_groups(groups, tasks), accuracy, *of_partition])
    return stream.getvalue()


def study_figure(studies: Mapping[int, GroupingStudy]) -> Figure:
    """A row a seed, a column a criterion: every partition's score against its accuracy; the chosen one and all in one
    are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(CRITERIA) + 0.6, 2.3 * len(studies) + 0.7), layout="constrained")
    panels = figure.subplots(len(studies), len(CRITERIA), squeeze=False, sharey="row")
    for row, (seed, of_seed) in zip(panels, studies.items()):
        together = next(at for at, groups in enumerate(of_seed.partitions) if len(groups) == 1)
        accuracies = 100 * np.array(of_seed.accuracies)
        for axes, outcome in zip(row, of_seed.criteria):
            chosen = of_seed.partitions.index(outcome.chosen)
            axes.scatter(outcome.scores, accuracies, s=9, color=BLUE, alpha=0.45, linewidths=0)
            axes.scatter(
                outcome.scores[together], accuracies[together], s=46, marker="s", color=BLACK, label="all in one"
            )
            axes.scatter(outcome.scores[chosen], accuracies[chosen], s=34, color=VERMILION, label="found", zorder=3)
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
    figure.supylabel("test accuracy, average over tasks, %", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _gains(accuracies: Sequence[float], studies: Sequence[GroupingStudy]) -> str:
    against = ([of.single_group for of in studies], [of.random for of in studies])
    gains = [[100 * (ours - theirs) for ours, theirs in zip(accuracies, of)] for of in against]
    return " | ".join([_spread([100 * accuracy for accuracy in accuracies]), *map(_spread, gains)])


def _spread(values: Sequence[float]) -> str:
    if any(map(isnan, values)):
        return "undefined"  # the correlation with accuracies that are all the same
    error = f" ± {stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{error}".replace("-", "−")
