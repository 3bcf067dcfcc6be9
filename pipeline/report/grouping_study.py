"""The grouping study as a page, Markdown, CSV and figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from math import isnan, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.names import shorten
from pipeline.grouping.study import SIGNS, GroupingStudy, best_on_other_seeds, ceiling, mean_and_error
from pipeline.grouping.text import format_groups
from pipeline.report import recommendation
from pipeline.report.page import embedded_image, html_page, html_table
from pipeline.report.scores import Estimate
from pipeline.report.summary import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GRAY = "#0072b2", "#d55e00", "#8a939c"
TITLES = {"accuracy": "Test accuracy", "test_loss": "Test loss"}
UNITS = {"accuracy": "points", "test_loss": "nats"}
UNIT_NOTES = {
    "accuracy": "In %, gains in points.",
    "test_loss": "Mean cross-entropy in nats, lower is better; a gain is positive where it falls.",
}
SCALES = {"accuracy": 100.0, "test_loss": 1.0}
"""Factor of a measure in tables and figures: accuracies are in %."""
DIGITS, PAIR_DIGITS = {"accuracy": 2, "test_loss": 3}, {"accuracy": 1, "test_loss": 3}
ALL_IN_ONE, EACH_ALONE, RANDOM = "all in one", "each alone", "random partition"
OTHER_SEEDS, HINDSIGHT = "best on the other seeds", "best in hindsight"
ANOTHER_SEED, NUM_GROUPS, PAIRS = "another seed of the results", "number of groups", "results of all pairs"

MeanAndError = tuple[float, float]
"""Mean over seeds and its standard error, NaN if unknown."""
Choices = Mapping[str, Sequence[int | None]]
"""Title of a row → index of its partition for each seed; None: a partition drawn at random."""


@dataclass(frozen=True)
class _Section:
    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_numeric: bool = True
    """Whether all columns but the first are numbers."""


def criterion_titles(study: GroupingStudy) -> list[str]:
    return [f"{criterion.affinity}, {criterion.objective}" for criterion in study.criteria]


def study_to_markdown(name: str, tasks: Sequence[str], studies: Mapping[int, GroupingStudy], config_title: str) -> str:
    """Return a report of the studies (by seed): means over seeds, ± standard error for two or more seeds.

    Args:
        config_title: one of `criterion_titles`, the affinity and objective of the config.
    """
    lines = [f"# {name}: which tasks help each other?", "", *_introduction(tasks, studies, config_title)]
    lines += [f"![{alt}]({file})" for file, alt in FIGURES.items()]
    for section in _sections(tasks, studies):
        lines += ["", f"## {section.title}", "", section.text, ""]
        lines += markdown_table(section.header, [[cell.replace("|", r"\|") for cell in row] for row in section.rows])
    return "\n".join([*lines, ""])


def study_to_html(
    name: str,
    tasks: Sequence[str],
    studies: Mapping[int, GroupingStudy],
    config_title: str,
    figures: Mapping[str, bytes],
) -> str:
    """Return the same as a page; `figures`: the content (PNG) of the files in FIGURES."""
    body = [f"<h1>{escape(name)}: which tasks help each other?</h1>"]
    body += [f"<p>{escape(text)}</p>" for text in _introduction(tasks, studies, config_title) if text]
    body += [embedded_image(figures[file], alt, attributes=' class="figure"') for file, alt in FIGURES.items()]
    for section in _sections(tasks, studies):
        body += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
        body.append(html_table(section.header, section.rows, numbers=section.is_numeric))
    return html_page(
        f"{name}: grouping study", "\n".join(body), "body { max-width: 76rem; } td { white-space: nowrap; }"
    )


def _introduction(tasks: Sequence[str], studies: Mapping[int, GroupingStudy], config_title: str) -> list[str]:
    """Return paragraphs, each followed by an empty line."""
    num_partitions = len(next(iter(studies.values())).partitions)
    seeds = f"seed{'s' if len(studies) > 1 else ''} {', '.join(map(str, studies))}"
    lines = [
        f"All {num_partitions:,} partitions of {len(tasks)} tasks, from {2 ** len(tasks) - 1} trainings per seed; "
        f"{seeds}. Results are means over tasks; ± is the standard error over seeds.",
        "",
    ]
    if len(studies) > 1:
        sentence = _recommendation(list(studies.values()), config_title)
        lines += [f"For the config's affinity and objective ({config_title}): {sentence}", ""]
    return lines


def _recommendation(studies: Sequence[GroupingStudy], config_title: str) -> str:
    """Return what follows from the accuracies for a run with this affinity and objective."""
    from scipy.stats import t  # lazily: help imports this module

    position = criterion_titles(studies[0]).index(config_title)
    chosen = {
        recommendation.EACH_ALONE: [study.each_alone for study in studies],
        recommendation.ALL_IN_ONE: [study.all_in_one for study in studies],
        recommendation.GROUPED: [study.criteria[position].chosen for study in studies],
    }
    accuracies = {
        name: np.array([study.values["accuracy"][index] for study, index in zip(studies, indices)])
        for name, indices in chosen.items()
    }
    differences = {
        name: {
            rival: Estimate(*mean_and_error((accuracies[name] - accuracies[rival]).tolist()))
            for rival in accuracies
            if rival != name
        }
        for name in accuracies
    }
    return recommendation.recommendation(differences, None, float(t.ppf(recommendation.QUANTILE, len(studies) - 1)))


def _sections(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> Iterator[_Section]:
    for measure in SIGNS:
        yield _choices_section(measure, list(studies.values()))
    yield _correlations_section(list(studies.values()))
    for measure in SIGNS:
        yield _pairs_section(measure, tasks, list(studies.values()))
    yield _chosen_section(tasks, studies)


# --- what each criterion chooses -------------------------------------------------------------------------------------


def _choices(studies: Sequence[GroupingStudy], measure: str) -> Choices:
    choices: dict[str, Sequence[int | None]] = {
        ALL_IN_ONE: [study.all_in_one for study in studies],
        EACH_ALONE: [study.each_alone for study in studies],
        RANDOM: [None] * len(studies),
        HINDSIGHT: [study.best(measure) for study in studies],
    }
    if len(studies) > 1:
        choices[OTHER_SEEDS] = best_on_other_seeds(studies, measure)
    for position, title in enumerate(criterion_titles(studies[0])):
        choices[title] = [study.criteria[position].chosen for study in studies]
    return choices


def _gain(
    studies: Sequence[GroupingStudy],
    measure: str,
    chosen: Sequence[int | None],
    reference: Callable[[GroupingStudy, int | None], float],
) -> MeanAndError:
    """Return the gain of the chosen partitions over a reference result, in UNITS."""
    gains = [
        SCALES[measure] * SIGNS[measure] * (_result(study, measure, index) - reference(study, index))
        for study, index in zip(studies, chosen, strict=True)
    ]
    return mean_and_error(gains)


def _result(study: GroupingStudy, measure: str, index: int | None) -> float:
    return study.random(measure) if index is None else float(study.values[measure][index])


def _random(study: GroupingStudy, index: int | None, measure: str) -> float:
    return study.random(measure)


def _random_of_sizes(study: GroupingStudy, measure: str, index: int | None) -> float:
    return study.random(measure) if index is None else study.random_of_sizes(measure, index)


def _choices_section(measure: str, studies: Sequence[GroupingStudy]) -> _Section:
    references: dict[str, Callable[[GroupingStudy, int | None], float]] = {
        ALL_IN_ONE: lambda study, _: study.values[measure][study.all_in_one],
        EACH_ALONE: lambda study, _: study.values[measure][study.each_alone],
        "random": partial(_random, measure=measure),
        "random, same sizes": lambda study, index: _random_of_sizes(study, measure, index),
        HINDSIGHT: lambda study, _: study.values[measure][study.best(measure)],
    }
    rows = []
    for title, chosen in _choices(studies, measure).items():
        results = [SCALES[measure] * _result(study, measure, index) for study, index in zip(studies, chosen)]
        gains = [_gain(studies, measure, chosen, reference) for reference in references.values()]
        better = ""
        if indices := [index for index in chosen if index is not None]:
            fractions = [100 * study.fraction_better(measure, index) for study, index in zip(studies, indices)]
            better = _format(mean_and_error(fractions), 0)
        digits = DIGITS[measure]
        rows.append([title, *(_format(value, digits) for value in (mean_and_error(results), *gains)), better])
    unit = "%" if measure == "accuracy" else UNITS[measure]
    text = (
        f"{UNIT_NOTES[measure]} A random partition is an expectation over all partitions, or over those with the same "
        f"sizes of groups. The {HINDSIGHT} is chosen by its own result, noise included"
    )
    text += f"; the {OTHER_SEEDS} is not." if len(studies) > 1 else "."
    header = ["groups, or affinity and objective that choose them", f"{TITLES[measure].lower()} ({unit})"]
    header += [f"gain over {reference}" for reference in references]
    return _Section(TITLES[measure], text, [*header, "better partitions (%)"], rows)


# --- correlations ----------------------------------------------------------------------------------------------------


def _correlations(studies: Sequence[GroupingStudy], measure: str) -> dict[str, tuple[MeanAndError, MeanAndError]]:
    """Return row → correlations with the results: over all partitions, and among those with equally many groups."""

    predictors = {
        PAIRS: [SIGNS[measure] * study.pair_estimates[measure] for study in studies],
        NUM_GROUPS: [study.num_groups for study in studies],
    }
    for position, title in enumerate(criterion_titles(studies[0])):
        predictors[title] = [study.criteria[position].scores for study in studies]
    rows = {ANOTHER_SEED: ceiling(studies, measure)} if len(studies) > 1 else {}
    for title, values in predictors.items():
        correlations = [study.correlations(predictor, measure) for study, predictor in zip(studies, values)]
        overall, same_number = zip(*correlations)
        rows[title] = mean_and_error(overall), mean_and_error(same_number)
    return rows


def _correlations_section(studies: Sequence[GroupingStudy]) -> _Section:
    by_measure = {measure: _correlations(studies, measure) for measure in SIGNS}
    rows = [
        [title, *(_format(value, 2) for correlations in by_measure.values() for value in correlations[title])]
        for title in by_measure["accuracy"]
    ]
    header = ["predictor"]
    for measure in SIGNS:
        header += [f"{TITLES[measure].lower()}, all partitions", "equally many groups"]
    text = (
        "Spearman's rank correlation of a predictor with the results, over all partitions and among those with equally "
        "many groups (mean over their number). "
    )
    if len(studies) > 1:
        bounds = " (accuracy) and ".join(
            f"{sqrt(max(correlations[ANOTHER_SEED][0][0], 0)):.2f}" for correlations in by_measure.values()
        )
        text += (
            f"{ANOTHER_SEED.capitalize()} tells how much of the differences between partitions is not noise: a perfect "
            f"predictor would reach its square root, {bounds} (test loss). "
        )
    text += (
        f"{PAIRS.capitalize()}: each task's result averaged over its mates, from the trainings of two tasks; it says "
        "whether pairs explain larger groups."
    )
    return _Section("Rank correlation", text, header, rows)


# --- pairs -----------------------------------------------------------------------------------------------------------


def _pair_gains(studies: Sequence[GroupingStudy], measure: str) -> list[list[MeanAndError]]:
    """Return the gains [mate][task] in UNITS; NaN on the diagonal."""
    gains = SCALES[measure] * np.stack([study.pair_gains[measure] for study in studies])
    tasks = range(gains.shape[1])
    return [[mean_and_error(gains[:, mate, task].tolist()) for task in tasks] for mate in tasks]


def _pairs_section(measure: str, tasks: Sequence[str], studies: Sequence[GroupingStudy]) -> _Section:
    digits = PAIR_DIGITS[measure]
    rows = [
        [f"with {mate}", *("" if isnan(gain[0]) else _format(gain, digits) for gain in gains)]
        for mate, gains in zip(tasks, _pair_gains(studies, measure))
    ]
    text = f"Gain of each task (column) from training with another (row) over training alone, in {UNITS[measure]}."
    return _Section(f"{TITLES[measure]}: gains of pairs", text, ["", *tasks], rows)


def _chosen_section(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> _Section:
    rows = []
    for position, title in enumerate(criterion_titles(next(iter(studies.values())))):
        seeds_by_groups: dict[str, list[str]] = {}
        for seed, study in studies.items():
            chosen = study.partitions[study.criteria[position].chosen]
            seeds_by_groups.setdefault(format_groups(chosen, tasks), []).append(str(seed))
        for groups, seeds in sorted(seeds_by_groups.items(), key=lambda item: -len(item[1])):
            rows.append([title, ", ".join(seeds), groups])
    header = ["affinity, objective", "seeds", "groups"]
    text = "What each affinity and objective choose, the most frequent first."
    return _Section("Chosen groups", text, header, rows, is_numeric=False)


def _format(estimate: MeanAndError, digits: int) -> str:
    mean, error = estimate
    if isnan(mean):
        return "undefined"
    text = f"{mean:z.{digits}f}" + ("" if isnan(error) else f" ± {error:.{digits}f}")
    return text.replace("-", "−")


# --- files -----------------------------------------------------------------------------------------------------------


def study_to_csv(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """Return one row per partition and seed: groups, accuracy (0 to 1), test loss (nats), the score by every
    criterion."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["seed", "groups", *SIGNS, *criterion_titles(next(iter(studies.values())))])
    for seed, study in studies.items():
        values = [study.values[measure] for measure in SIGNS]
        rows = np.stack([*values, *(criterion.scores for criterion in study.criteria)], axis=1)
        for groups, row in zip(study.partitions, rows.tolist()):
            writer.writerow([seed, format_groups(groups, tasks), *row])
    return stream.getvalue()


def pair_gains_to_csv(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> str:
    """Return one row per ordered pair of tasks and seed: gains of `task` from training `with`, accuracy 0 to 1."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["seed", "task", "with", *(f"gain in {measure}" for measure in SIGNS)])
    for seed, study in studies.items():
        for column, task in enumerate(tasks):
            for row, mate in enumerate(tasks):
                if row != column:
                    gains = [float(study.pair_gains[measure][row, column]) for measure in SIGNS]
                    writer.writerow([seed, task, mate, *gains])
    return stream.getvalue()


def study_figure(studies: Mapping[int, GroupingStudy]) -> Figure:
    """Plot for all criteria the gains of their choices over a random partition, and their correlations."""
    from matplotlib.figure import Figure

    seed_studies = list(studies.values())
    choices = [title for title in _choices(seed_studies, "accuracy") if title != RANDOM]
    num_affinities = len(dict.fromkeys(criterion.affinity for criterion in seed_studies[0].criteria))
    criteria = criterion_titles(seed_studies[0])
    baselines = [title for title in choices if title not in criteria]
    rows = [*baselines, NUM_GROUPS, PAIRS, *criteria]
    position = {title: -index for index, title in enumerate(rows)}
    figure = Figure(figsize=(11.5, 0.27 * len(rows) + 1.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    colors = {"accuracy": BLUE, "test_loss": VERMILION}
    for axes, measure in zip(panels, SIGNS):
        by_title = _choices(seed_studies, measure)
        for title in choices:
            gain = _gain(seed_studies, measure, by_title[title], partial(_random, measure=measure))
            _draw_estimate(axes, gain, position[title], colors[measure])
        axes.set_xlabel(f"gain in {TITLES[measure].lower()} over\na random partition ({UNITS[measure]})")
    for offset, measure in ((0.14, "accuracy"), (-0.14, "test_loss")):
        correlations = _correlations(seed_studies, measure)
        for title in (NUM_GROUPS, PAIRS, *criteria):
            _draw_estimate(panels[2], correlations[title][0], position[title] + offset, colors[measure])
        panels[2].plot([], [], "o", markersize=4, color=colors[measure], label=f"with {TITLES[measure].lower()}")
        if len(studies) > 1:
            panels[2].axvline(
                correlations[ANOTHER_SEED][0][0],
                color=colors[measure],
                linewidth=1,
                linestyle="--",
                label="the same, of another seed",
            )
    panels[2].set_xlabel("rank correlation over\nall partitions")
    panels[2].set_xlim(-1, 1)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    panels[0].set_yticks(list(position.values()), rows)
    panels[0].set_ylim(-len(rows) + 0.4, 0.6)
    num_objectives = len(criteria) // num_affinities
    separators = [len(rows) - len(criteria) + num_objectives * number for number in range(num_affinities)]
    for axes in panels:
        axes.axvline(0, color=GRAY, linewidth=0.8)
        for row in separators:
            axes.axhline(0.5 - row, color="#e3e7eb", linewidth=0.8)
        axes.tick_params(labelsize=9)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_estimate(axes: Axes, estimate: MeanAndError, y: float, color: str) -> None:
    mean, error = estimate
    axes.errorbar(mean, y, xerr=None if isnan(error) else error, fmt="o", markersize=4, linewidth=1.2, color=color)


def pair_gains_figure(tasks: Sequence[str], studies: Mapping[int, GroupingStudy]) -> Figure:
    """Plot the gains of all pairs as a heat map for each measure; ± is the standard error over seeds."""
    from matplotlib.figure import Figure

    size = 0.8 * len(tasks)
    figure = Figure(figsize=(2 * size + 2.6, size + 1.3), layout="constrained")
    names = [shorten(task) for task in tasks]
    rotation: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    for axes, measure in zip(figure.subplots(1, 2), SIGNS):
        gains = _pair_gains(list(studies.values()), measure)
        means = np.array([[mean for mean, _ in row] for row in gains])
        limit = np.nanmax(np.abs(means)) or 1.0
        axes.imshow(means, cmap="RdBu", vmin=-limit, vmax=limit)
        digits = PAIR_DIGITS[measure]
        for row, column in zip(*np.nonzero(~np.isnan(means))):
            text = _format(gains[row][column], digits).replace(" ± ", "\n± ")
            color = "white" if abs(means[row, column]) > 0.6 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
        axes.set_xticks(range(len(tasks)), names, parse_math=False, **rotation)
        axes.set_yticks(range(len(tasks)), [f"with {name}" for name in names], parse_math=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_facecolor("#e3e7eb")
        axes.set_title(f"gain in {TITLES[measure].lower()} over training alone ({UNITS[measure]})", fontsize=10)
    return figure


FIGURES = {
    "grouping_study.png": "gains over a random partition and rank correlations of every affinity and objective",
    "pair_gains.png": "gains of each task from training with another",
}
"""File → its description."""
