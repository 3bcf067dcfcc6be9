"""Report of a data check: tables for the terminal, and an HTML page with samples of every class."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from rich.console import Group
from rich.markup import escape as escape_markup
from rich.table import Table

from pipeline.data.findings import CheckedImage, Example, Finding, ShownImage
from pipeline.data.image_stats import ImageStats
from pipeline.data.names import pluralize
from pipeline.report.page import embedded_image, html_page, html_table

MAX_EXAMPLES, MAX_PAGE_EXAMPLES = 5, 200
"""Examples of a finding in the terminal and on the page."""
MAX_CHARACTERS, MAX_PAGE_CHARACTERS = 150, 1000
"""Characters of an example: a group of near-duplicates may have thousands of images."""
MAX_SHOWN, MAX_SHOWN_OF_EXAMPLE = 24, 6
"""Images of a finding, and of one of its examples, that the page shows."""
SHOWN_SIDE = 144
"""Pixels of the longer side of these images: 5 KB each, so that a page has at most about 2 MB of them, 10 MB of samples
(checked_images.MAX_SAMPLES) and 4 MB of text."""
COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
PAGE_STYLE = """
.error { background: var(--error); } .warning { background: var(--warning); } .note { background: var(--tint); }
.finding { padding: .6rem .9rem; margin: .8rem 0; } .finding p { margin: .2rem 0; } .finding h3 { margin: 0; }
.finding pre { background: none; padding: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.finding details { margin-top: .4rem; }
.images { display: flex; flex-wrap: wrap; gap: .6rem; margin: .6rem 0; }
.together { display: flex; flex-wrap: wrap; gap: .6rem; border: 1px solid var(--muted); padding: .5rem; }
.images figure { margin: 0; width: 9rem; font-size: .8rem; line-height: 1.3; }
.images figcaption { overflow-wrap: anywhere; } .images img { display: block; max-height: 9rem; background: #fff; }
.image { height: 9rem; display: flex; align-items: center; justify-content: center; margin-bottom: .2rem; }
.samples td { padding: .1rem .4rem; vertical-align: middle; } .samples img { display: inline-block; margin: 0 .1rem; }
.samples th { position: sticky; top: 0; background: var(--paper); }
@media (max-width: 40rem) { .samples { display: block; overflow-x: auto; }
  .images figure { width: 7.5rem; } .image { height: 7.5rem; } .images img { max-height: 7.5rem; } }
@media print { .images figure, .together { break-inside: avoid; } .finding h3 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class TaskOverview:
    task: str
    images: int
    """Number of images that can be decoded."""
    classes: int
    smallest_class: int
    largest_class: int
    median_size: str
    formats: str
    modes: str


def task_overviews(images: Sequence[CheckedImage], classes: Mapping[str, Sequence[str]]) -> list[TaskOverview]:
    """Return an overview of each task, in the order of `classes`."""
    stats_by_task: dict[str, list[ImageStats]] = defaultdict(list)
    counts: Counter[tuple[str, str]] = Counter()
    for checked in images:
        if checked.stats:
            stats_by_task[checked.image.task].append(checked.stats)
            counts.update((checked.image.task, name) for name in checked.image.class_folders)
    overviews = []
    for task, names in classes.items():
        stats = stats_by_task[task]
        class_sizes = [counts[task, name] for name in names]
        size = f"{median(s.width for s in stats):.0f} x {median(s.height for s in stats):.0f}" if stats else ""
        overviews.append(
            TaskOverview(
                task,
                len(stats),
                len(names),
                min(class_sizes),
                max(class_sizes),
                size,
                _frequencies(image.format for image in stats),
                _frequencies(image.mode for image in stats),
            )
        )
    return overviews


def summary_line(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each severity, in words."""
    counts = Counter[str](finding.severity for finding in findings)
    return ", ".join(pluralize(counts[severity], severity) for severity in COLORS if counts[severity]) or "no findings"


def check_tables(name: str, tasks: Sequence[TaskOverview], findings: Sequence[Finding]) -> Group:
    """Build the tables for the terminal."""
    table = Table(title=escape_markup(_title(name, tasks)))
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify)
    for task in tasks:
        table.add_row(*(escape_markup(cell) for cell in _cells(task)))
    finding_table = Table(show_header=False, box=None, padding=(0, 1, 1, 1))
    for finding in findings:
        lines = [f"[bold]{escape_markup(finding.title)}[/]", escape_markup(finding.remedy)]
        lines += [
            f"[dim]{escape_markup(_truncate(example.text, MAX_CHARACTERS))}[/]"
            for example in finding.examples[:MAX_EXAMPLES]
        ]
        if (num_hidden := len(finding.examples) - MAX_EXAMPLES) > 0:
            lines.append(f"[dim]and {num_hidden:,} more[/]")
        finding_table.add_row(f"[{COLORS[finding.severity]}]{finding.severity}[/]", "\n".join(lines))
    return Group(table, finding_table) if findings else Group(table)


def shown_examples(finding: Finding) -> list[Example]:
    """Return the examples whose images the page shows, each with those that it shows."""
    examples: list[Example] = []
    num_images = 0
    for example in finding.examples:
        images = example.images[:MAX_SHOWN_OF_EXAMPLE]
        num_images += len(images)
        if not images or num_images > MAX_SHOWN:
            break
        examples.append(Example(example.detail, images))
    return examples


def check_page(
    name: str,
    tasks: Sequence[TaskOverview],
    findings: Sequence[Finding],
    samples: Mapping[tuple[str, str], Sequence[bytes]],
    class_names: Mapping[str, str],
    thumbnails: Mapping[str, bytes],
    notes: Sequence[str] = (),
) -> str:
    """Build the HTML page.

    Args:
        samples: (task, class folder) → thumbnails as JPEGs.
        class_names: class folder → class name shown to CLIP.
        thumbnails: path of an image of `shown_examples` → thumbnail as a JPEG; broken images have none.
        notes: what else to know of the data.
    """
    parts = [
        f"<h1>{escape(_title(name, tasks))}</h1>",
        html_table([title for title, _ in _COLUMNS], [_cells(task) for task in tasks]),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Findings</h2>",
        *(_finding(finding, thumbnails, class_names) for finding in findings),
        *([] if findings else ["<p>No findings.</p>"]),
        "<h2>Samples</h2>",
        _samples([task.task for task in tasks], samples, class_names),
    ]
    return html_page(f"{name}: data check", "\n".join(parts), PAGE_STYLE)


def _title(name: str, tasks: Sequence[TaskOverview]) -> str:
    num_images = sum(task.images for task in tasks)
    return f"{name}: {pluralize(num_images, 'image')} in {pluralize(len(tasks), 'task')}"


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("task", "left"),
    ("images", "right"),
    ("classes", "right"),
    ("per class", "right"),
    ("median size", "right"),
    ("formats", "left"),
    ("modes", "left"),
)


def _cells(task: TaskOverview) -> list[str]:
    per_class = f"{task.smallest_class:,} to {task.largest_class:,}"
    return [task.task, f"{task.images:,}", f"{task.classes:,}", per_class, task.median_size, task.formats, task.modes]


def _frequencies(values: Any) -> str:
    counts = Counter(values)
    total = sum(counts.values())
    return ", ".join(
        name if count == total else f"{name} {100 * count / total:.2g} %" for name, count in counts.most_common(3)
    )


def _finding(finding: Finding, thumbnails: Mapping[str, bytes], class_names: Mapping[str, str]) -> str:
    lines = [_truncate(example.text, MAX_PAGE_CHARACTERS) for example in finding.examples[:MAX_PAGE_EXAMPLES]]
    if (num_hidden := len(finding.examples) - MAX_PAGE_EXAMPLES) > 0:
        lines.append(f"and {num_hidden:,} more; all are in check.json")
    text = f"<pre>{escape(chr(10).join(lines))}</pre>"
    examples = shown_examples(finding)
    if any(image.path in thumbnails for example in examples for image in example.images):
        figures = "".join(_example(example, thumbnails, class_names) for example in examples)
        text = f"<details><summary>all {pluralize(len(finding.examples), 'example')}</summary>{text}</details>"
        is_whole = tuple(examples) == finding.examples
        text = f'<div class="images">{figures}</div>{"" if is_whole else text}'
    return (
        f'<div class="finding {finding.severity}"><h3>{finding.severity}: {escape(finding.title)}</h3>'
        f"<p>{escape(finding.remedy)}</p>{text}</div>"
    )


def _example(example: Example, thumbnails: Mapping[str, bytes], class_names: Mapping[str, str]) -> str:
    figures = "".join(_figure(image, example.detail, thumbnails, class_names) for image in example.images)
    return figures if len(example.images) == 1 else f'<div class="together">{figures}</div>'


def _figure(image: ShownImage, detail: str, thumbnails: Mapping[str, bytes], class_names: Mapping[str, str]) -> str:
    jpeg = thumbnails.get(image.path)
    picture = embedded_image(jpeg, image.path, "jpeg") if jpeg else "cannot be shown"
    label = f"{image.task} · {class_names.get(image.class_folder, image.class_folder)}"
    caption = "<br>".join(
        [
            f"<b>{escape(label)}</b>",
            escape(image.path),
            *([escape(_truncate(detail, MAX_CHARACTERS))] if detail else []),
        ]
    )
    return f'<figure><div class="image">{picture}</div><figcaption>{caption}</figcaption></figure>'


def _samples(
    tasks: Sequence[str], samples: Mapping[tuple[str, str], Sequence[bytes]], class_names: Mapping[str, str]
) -> str:
    header = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    lines = []
    for folder in sorted({folder for _, folder in samples}):
        cells = (
            "".join(embedded_image(jpeg, "", "jpeg") for jpeg in samples.get((task, folder), ())) for task in tasks
        )
        lines.append(f"<tr><td>{escape(class_names[folder])}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<table class="samples"><tr><th></th>{header}</tr>{"".join(lines)}</table>'


def _truncate(line: str, limit: int) -> str:
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
