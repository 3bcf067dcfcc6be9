"""Report of a run as one HTML page: results, groups, and for each task its classes, confusions and worst mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from pipeline.data.names import pluralize, shorten
from pipeline.grouping.text import format_groups
from pipeline.report.metrics import ACCURACY, MAP
from pipeline.report.next_steps import NextStep
from pipeline.report.page import embedded_image, html_page, html_table
from pipeline.report.scores import AnyScores, MultiLabelScores, ScoresByTask, TaskScores
from pipeline.report.summary import (
    AVERAGE_ROW,
    MAIN,
    ZERO_SHOT,
    Summary,
    accuracy_cells,
    best_columns,
    method_title,
    percent,
    transpose_if_wide,
)

MAX_METHODS = 4
"""Methods whose mistakes are shown."""
MAX_MISTAKES, MAX_THUMBNAILS = 8, 600
"""Mistakes of a method on a task, and on the whole page."""
THUMBNAIL = 96
"""Longer side in pixels."""
MAX_MATRIX_CLASSES = 70
"""Confusions between more classes are listed only."""
MAX_NUMBERED_CLASSES = 25
"""Cells of larger matrices have no numbers."""
MAX_CLASSES, MAX_PAIRS = 15, 10
"""Rows of a task that are visible at once."""

_METRIC_TITLES = {ACCURACY: "Accuracy", MAP: "Mean average precision over classes (mAP)"}
_CLASS_TABLES = {
    ACCURACY: "<code>class_accuracy.parquet</code>, <code>confusions.parquet</code>",
    MAP: "<code>class_precision.parquet</code>",
}

RUN_STYLE = """
table.results td { white-space: nowrap; } table.results th { vertical-align: bottom; }
.conclusion { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .8rem; font-size: 1.05rem; }
table.results tr.total td { border-top: 1px solid var(--line); }
table.classes { width: 100%; } table.classes td { padding-top: .1rem; padding-bottom: .1rem; }
table.classes td:first-child { max-width: 14rem; overflow-wrap: break-word; }
table.classes td.number { white-space: nowrap; } table.classes td.bar { width: 60%; vertical-align: middle; }
.track { position: relative; height: .8rem; background: var(--tint); }
.track div { height: 100%; background: var(--accent); }
.track i { position: absolute; top: -.15rem; bottom: -.15rem; width: 3px; margin-left: -1.5px; }
.track i, .key i { background: var(--miss); }
.key i { display: inline-block; width: 3px; height: .9rem; vertical-align: text-bottom; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .8rem; }
.mistakes { margin: .5rem 0 1rem; }
.mistakes figure { margin: 0; font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }
.mistakes img { display: block; width: 96px; height: 96px; object-fit: contain; background: var(--tint); }
.mistakes small { color: var(--muted); display: block; }
svg.matrix { display: block; font: 11px system-ui, sans-serif; } svg.matrix text { fill: var(--text); }
svg.matrix .field { fill: var(--tint); fill-opacity: .45; } svg.matrix .hit { fill: var(--accent); }
svg.matrix .miss { fill: var(--miss); } svg.matrix text.strong { fill: var(--paper); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.pictures figure { margin: 0; } nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
.confusions { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } .confusions > * { flex: 1 1 18rem; min-width: 0; }
.key { margin: .2rem 0; break-after: avoid; }
@media print { svg.matrix { max-width: 100%; height: auto; } .pictures { grid-template-columns: 1fr 1fr; }
  table.classes { font-size: 9pt; } table.classes, .confusions { break-inside: avoid; }
  .mistakes { grid-template-columns: repeat(8, 1fr); gap: .5rem; } .mistakes img { width: 100%; height: auto; } }
@media (max-width: 30rem) { .pictures { grid-template-columns: 1fr; } .mistakes { grid-template-columns: 1fr 1fr 1fr; }
  .mistakes figure { font-size: .72rem; } .wide > img.figure { max-width: none; width: 36rem; }
  table.results { font-size: .8rem; } table.results td, table.results th { padding-right: .5rem; }
  table.results td:first-child { white-space: normal; } }
"""


@dataclass(frozen=True)
class Mistake:
    """Wrong prediction of a test image; `thumbnail` is a JPEG, empty if the image cannot be decoded."""

    path: str
    true_label: str
    label: str
    probability: float
    thumbnail: bytes


Mistakes = Mapping[tuple[str, str], Sequence[Mistake]]
"""(Task, method) → its mistakes."""


@dataclass(frozen=True)
class RunDetails:
    """Content of the page of a run besides its results.

    Args:
        title_facts: short facts below the title: the CLIP, the number of images, the date.
        figures: title → PNG, of the accuracies and of the grouping.
        skipped: numbers and kinds of files and images that were not used.
        findings: issues of the data check, a line each.
        data_page: relative link to the page of the data check.
        command: the shell command of the run.
        config: its config as YAML.
        versions: name → version, of packages and the machine.
    """

    title_facts: Sequence[str]
    accuracy_figure: bytes
    grouping_figures: Mapping[str, bytes]
    skipped: Sequence[str]
    findings: Sequence[str]
    data_page: str
    next_steps: Sequence[NextStep]
    command: str
    config: str
    versions: Mapping[str, str]
    comparison: Sequence[Sequence[str]] = ()
    """Header and rows of a table in place of that of the methods."""
    notes: Sequence[str] = ()
    """Sentences above it."""


def shown_methods(summary: Summary) -> list[str]:
    """Return the methods whose mistakes the page shows: MAIN, zero-shot CLIP, and the best others."""
    methods = summary.methods
    ranked = sorted(methods, key=lambda name: -float(methods[name]["average"]))
    main = MAIN if MAIN in methods else ranked[0]
    ends = [main, *([ZERO_SHOT] if ZERO_SHOT in methods and main != ZERO_SHOT else [])]
    best = [name for name in ranked if name not in ends][: MAX_METHODS - len(ends)]
    return [main, *best, *ends[1:]]


def mistakes_per_task(num_tasks: int, num_methods: int) -> int:
    """Return how many mistakes of a method on a task are shown, so that the page stays below MAX_THUMBNAILS."""
    return max(1, min(MAX_MISTAKES, MAX_THUMBNAILS // (num_tasks * num_methods)))


def run_page(summary: Summary, scores: Mapping[str, ScoresByTask], mistakes: Mistakes, details: RunDetails) -> str:
    """Return the page as HTML.

    Args:
        scores: method → task → scores, of the methods in `summary` and the tasks that the run trained.
        mistakes: those of `shown_methods`.
    """
    methods = shown_methods(summary)
    tasks = list(scores[methods[0]])
    task_links = "".join(f'<a href="#task-{number}">{escape(task)}</a>' for number, task in enumerate(tasks))
    parts = [
        f"<h1>{escape(summary.name)}: {summary.shots}-shot test {summary.metric}</h1>",
        f'<p class="muted">{" · ".join(map(escape, details.title_facts))}</p>',
        *(f'<p class="note">{escape(warning)}</p>' for warning in (*summary.warnings, *_skipped(details))),
        f'<nav class="screen"><a href="#results">Results</a><a href="#groups">Groups</a>{task_links}'
        '<a href="#data">Data</a><a href="#next">Next</a><a href="#run">Run</a></nav>',
        '<h2 id="results">Results</h2>',
        *([f'<p class="conclusion">{escape(summary.conclusion)}</p>'] if summary.conclusion else []),
        *(f"<p>{escape(note)}</p>" for note in details.notes),
        html_table(details.comparison[0], details.comparison[1:], numbers=True)
        if details.comparison
        else _results_table(summary),
        f'<p class="muted">{_METRIC_TITLES[summary.metric]} (%) ± standard error of the test set'
        + ("" if details.comparison else "; the best of each task in bold")
        + ". Differences are compared image by image; "
        + ("on a level: within one standard error; may be chance: within 2.4. " if summary.conclusion else "")
        + "Another draw of the training images changes the numbers too: compare several seeds with "
        "<code>mmap-clip benchmark</code>.</p>",
        '<div class="wide">'
        + embedded_image(details.accuracy_figure, f"Test {summary.metric} of each method", attributes=' class="figure"')
        + "</div>",
        '<h2 id="groups">Groups</h2>',
        "<p>"
        + "".join(f'<span class="group">{escape(format_groups([group]))}</span>' for group in summary.groups)
        + f'</p><p>{escape(summary.grouping)} <a href="grouping.html">How sure the groups are</a></p>',
        '<div class="pictures">'
        + "".join(
            f"<figure>{embedded_image(image, title, attributes=' class=figure')}</figure>"
            for title, image in details.grouping_figures.items()
        )
        + "</div>",
    ]
    for number, task in enumerate(tasks):
        parts += [f'<h2 id="task-{number}">{escape(task)}</h2>', *_task_section(task, methods, scores, mistakes)]
    parts += _data_section(details)
    parts += [
        '<h2 id="next">Next</h2>',
        *map(_next_step, details.next_steps),
        '<h2 id="run">Run</h2>',
        f"<pre>{escape(details.command)}</pre>",
        html_table(
            ("stage", "seconds"), [(name, f"{value:.1f}") for name, value in summary.stages.items()], numbers=True
        ),
        f"<details><summary>Config</summary><pre>{escape(details.config)}</pre></details>",
        "<details><summary>Versions</summary>"
        + html_table(("package", "version"), list(details.versions.items()))
        + "</details>",
        "<p>In this folder: <code>predictions.parquet</code> (every test image with its prediction by each method), "
        + _CLASS_TABLES[summary.metric]
        + ", <code>summary.json</code>, and the figures.</p>",
    ]
    return html_page(f"{summary.name}: report", "\n".join(parts), RUN_STYLE)


def _results_table(summary: Summary) -> str:
    header, *rows = accuracy_cells(summary)
    cells = [
        [escape(name), *(f"<b>{cell}</b>" if column in best else cell for column, cell in enumerate(row, 1))]
        for (name, *row), best in zip(rows, best_columns(rows))
    ]
    header, *lines = transpose_if_wide(summary, [list(map(escape, header)), *cells])
    head = "".join(f"<th{' class=number' if column else ''}>{name}</th>" for column, name in enumerate(header))
    body = "".join(
        f"<tr{' class=total' if line[0] == AVERAGE_ROW else ''}>"
        + "".join(f"<td{' class=number' if column else ''}>{cell}</td>" for column, cell in enumerate(line))
        + "</tr>"
        for line in lines
    )
    return f'<div class="wide"><table class="results"><tr>{head}</tr>{body}</table></div>'


def _task_section(
    task: str, methods: Sequence[str], scores: Mapping[str, ScoresByTask], mistakes: Mistakes
) -> Iterator[str]:
    main = scores[methods[0]][task]
    title = escape(method_title(methods[0]))
    zero_shot = scores[ZERO_SHOT][task] if ZERO_SHOT in scores and methods[0] != ZERO_SHOT else None
    value = percent(main.value, main.standard_error)
    images, classes = pluralize(main.num_images, "test image"), f"{len(main.class_names)} classes"
    if isinstance(main, MultiLabelScores):
        yield f"<p>{title}: mAP {value} % on {images} with labels of {classes}.</p>"
        yield "<h3>Average precision of each class, lowest first</h3>"
        yield _precision_table(main, zero_shot)
        for method in methods[1:]:
            method_scores = scores[method][task]
            value = percent(method_scores.value, method_scores.standard_error)
            yield f"<p>{escape(method_title(method))}: mAP {value} %</p>"
        return
    yield f"<p>{title}: {value} % of {images} in {classes}.</p>"
    if main.correct.all():
        yield "<p>Every test image is classified correctly.</p>"
    else:
        yield "<h3>Accuracy of each class, lowest first</h3>"
        yield _class_table(main, zero_shot)
        matrix = _matrix(main) if len(main.class_names) <= MAX_MATRIX_CLASSES else ""
        kind = ' class="confusions"' if len(main.class_names) <= MAX_NUMBERED_CLASSES else ""
        yield f"<h3>Confusions</h3><div{kind}>{matrix}<div>{_pair_table(main)}</div></div>"
        yield "<h3>Most confident mistakes</h3>"
        yield _mistake_grid(mistakes.get((task, methods[0]), ()))
    for method in methods[1:]:
        method_scores = scores[method][task]
        assert isinstance(method_scores, TaskScores)
        accuracy = percent(method_scores.value, method_scores.standard_error)
        yield f"<details><summary>{escape(method_title(method))}: {accuracy} %</summary>"
        if not method_scores.correct.all():
            yield _pair_table(method_scores)
            yield _mistake_grid(mistakes.get((task, method), ()))
        yield "</details>"


def _class_table(main: TaskScores, zero_shot: AnyScores | None) -> str:
    images, hits = main.class_counts()
    zero_shot_hits = zero_shot.class_counts()[1] if isinstance(zero_shot, TaskScores) else None
    present = [int(label) for label in np.flatnonzero(images)]
    order = sorted(present, key=lambda label: (hits[label] / images[label], main.class_names[label]))
    rows = [
        _class_row(
            main.class_names[label],
            hits[label] / images[label],
            None if zero_shot_hits is None else zero_shot_hits[label] / images[label],
            f"{hits[label]} of {images[label]}",
        )
        for label in order
    ]
    return _bar_table(rows, zero_shot_hits is not None)


def _precision_table(main: MultiLabelScores, zero_shot: AnyScores | None) -> str:
    images, values = main.has_label.sum(axis=0), main.average_precisions
    zero_shot_values = zero_shot.average_precisions if isinstance(zero_shot, MultiLabelScores) else None
    present = [int(label) for label in np.flatnonzero(images)]
    rows = [
        _class_row(
            main.class_names[label],
            values[label],
            None if zero_shot_values is None else zero_shot_values[label],
            pluralize(int(images[label]), "image"),
        )
        for label in sorted(present, key=lambda label: (values[label], main.class_names[label]))
    ]
    return _bar_table(rows, zero_shot_values is not None)


def _class_row(name: str, value: float, zero_shot: float | None, images: str) -> str:
    """Return a row with a bar of a fraction."""
    mark = "" if zero_shot is None else f'<i style="left:{100 * zero_shot:.1f}%"></i>'
    return (
        f"<tr><td>{escape(name)}</td>"
        f'<td class="bar"><div class="track"><div style="width:{100 * value:.1f}%"></div>{mark}</div></td>'
        f'<td class="number">{100 * value:.0f} %</td><td class="number">{images}</td></tr>'
    )


def _bar_table(rows: Sequence[str], has_zero_shot: bool) -> str:
    key = '<p class="key muted"><i></i> zero-shot</p>' if has_zero_shot else ""
    return f'{key}<table class="classes">{_folded(rows, MAX_CLASSES, "table", "classes")}'


def _folded(rows: Sequence[str], limit: int, tag: str, noun: str) -> str:
    """Return rows of an open element and its end; those beyond the limit are folded."""
    if len(rows) <= limit:
        return f"{''.join(rows)}</{tag}>"
    return (
        f"{''.join(rows[:limit])}</{tag}><details><summary>{len(rows) - limit} more {noun}</summary>"
        f'<{tag} class="{noun}">{"".join(rows[limit:])}</{tag}></details>'
    )


def _pair_table(scores: TaskScores) -> str:
    images, _ = scores.class_counts()
    names = scores.class_names
    pairs = [confusion for confusion in scores.confusions() if confusion.label != confusion.predicted]
    rows = [
        (names[pair.label], names[pair.predicted], f"{pair.images} of {images[pair.label]}")
        for pair in pairs[:MAX_PAIRS]
    ]
    table = html_table(("class", "taken for", "test images"), rows)
    more = f'<p class="muted">and {len(pairs) - MAX_PAIRS} pairs more, in confusions.parquet</p>'
    return table + (more if len(pairs) > MAX_PAIRS else "")


def _matrix(scores: TaskScores) -> str:
    """Return the confusion matrix as SVG: a row per true class, a column per predicted class."""
    names, (images, _) = scores.class_names, scores.class_counts()
    num_classes = len(names)
    cell = 34 if num_classes <= 12 else 26 if num_classes <= MAX_NUMBERED_CLASSES else 13
    shortened = [shorten(name, 18) for name in names]
    margin = 12 + round(6.4 * max(map(len, shortened)))
    size = margin + num_classes * cell
    parts = [
        f'<svg class="matrix" role="img" aria-label="confusion matrix" width="{size + 1}" height="{size + 1}" '
        f'viewBox="0 0 {size + 1} {size + 1}">',
        f'<rect class="field" x="{margin}" y="{margin}" width="{num_classes * cell}" height="{num_classes * cell}"/>',
    ]
    for position, name in enumerate(shortened):
        center = margin + (position + 0.5) * cell
        parts.append(f'<text x="{margin - 5}" y="{center + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text transform="translate({center + 4:.1f},{margin - 5}) rotate(-90)">{escape(name)}</text>')
    for label, predicted, count in scores.confusions():
        share = count / images[label]
        x, y = margin + predicted * cell, margin + label * cell
        kind = "hit" if label == predicted else "miss"
        tooltip = f"{names[label]} → {names[predicted]}: {count} of {images[label]}"
        parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
            f'fill-opacity="{0.15 + 0.85 * share:.2f}"><title>{escape(tooltip)}</title></rect>'
        )
        if num_classes <= MAX_NUMBERED_CLASSES:
            strong = ' class="strong"' if share > 0.55 else ""
            parts.append(
                f'<text{strong} x="{x + (cell - 1) / 2}" y="{y + cell / 2 + 3.5}" text-anchor="middle" '
                f'pointer-events="none">{count}</text>'
            )
    caption = '<p class="muted">Rows: true class; columns: predicted class.</p>'
    return f'<div><div class="wide">{"".join(parts)}</svg></div>{caption}</div>'


def _mistake_grid(mistakes: Sequence[Mistake]) -> str:
    figures = []
    for mistake in mistakes:
        image = embedded_image(mistake.thumbnail, mistake.path, "jpeg") if mistake.thumbnail else ""
        figures.append(
            f'<figure title="{escape(mistake.path)}">{image}<b>{escape(mistake.true_label)}</b> taken for '
            f"<b>{escape(mistake.label)}</b>, {100 * mistake.probability:.0f} %"
            f"<small>{escape(mistake.path).replace('/', '/<wbr>')}</small></figure>"
        )
    return f'<div class="mistakes">{"".join(figures)}</div>'


def _skipped(details: RunDetails) -> list[str]:
    return [f"Not used of the data: {', '.join(details.skipped)}"] if details.skipped else []


def _data_section(details: RunDetails) -> Iterator[str]:
    yield '<h2 id="data">Data</h2>'
    findings = details.findings or ["No issues of the images were found."]
    yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in findings)}</ul>"
    yield f'<p><a href="{escape(details.data_page)}">Samples of every class, and all issues of the images</a></p>'


def _next_step(step: NextStep) -> str:
    command = f"<pre>{escape(step.command)}</pre>" if step.command else ""
    link = f'<p><a href="{escape(step.url)}">{escape(step.url)}</a></p>' if step.url else ""
    return f"<h3>{escape(step.purpose)}</h3>{command}{link}"
