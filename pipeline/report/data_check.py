"""Report of a data check: tables for the terminal, and an HTML page with samples of every class."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from rich.console import Group
from rich.markup import escape as escape_markup
from rich.table import Table

from pipeline.data.findings import CheckedImage, Finding
from pipeline.data.image_stats import ImageStats
from pipeline.data.names import pluralize
from pipeline.report.page import html_page

MAX_EXAMPLES, MAX_PAGE_EXAMPLES = 5, 200
"""Examples of a finding in the terminal and on the page."""
MAX_CHARACTERS, MAX_PAGE_CHARACTERS = 150, 1000
"""Characters of an example: a group of near-duplicates may have thousands of images."""
COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
PAGE_STYLE = """
.error { background: var(--error); } .warning { background: var(--warning); } .note { background: var(--tint); }
.finding { padding: .5rem .9rem; margin: .5rem 0; } .finding p { margin: .2rem 0; } .finding pre { overflow-x: auto; }
.samples td { padding: .1rem .4rem; vertical-align: middle; } .samples img { display: inline-block; margin: 0 .1rem; }
.samples th { position: sticky; top: 0; background: var(--paper); }
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
            counts[checked.image.task, checked.image.class_folder] += 1
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
    table = Table(title=f"{escape_markup(name)}: {sum(task.images for task in tasks):,} images in {len(tasks)} tasks")
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify)
    for task in tasks:
        table.add_row(*(escape_markup(cell) for cell in _cells(task)))
    finding_table = Table(show_header=False, box=None, padding=(0, 1, 1, 1))
    for finding in findings:
        lines = [f"[bold]{escape_markup(finding.title)}[/]", escape_markup(finding.remedy)]
        lines += [
            f"[dim]{escape_markup(_truncate(line, MAX_CHARACTERS))}[/]" for line in finding.examples[:MAX_EXAMPLES]
        ]
        if (num_hidden := len(finding.examples) - MAX_EXAMPLES) > 0:
            lines.append(f"[dim]and {num_hidden:,} more[/]")
        finding_table.add_row(f"[{COLORS[finding.severity]}]{finding.severity}[/]", "\n".join(lines))
    return Group(table, finding_table) if findings else Group(table)


def check_page(
    name: str,
    tasks: Sequence[TaskOverview],
    findings: Sequence[Finding],
    samples: Mapping[tuple[str, str], Sequence[bytes]],
    class_names: Mapping[str, str],
) -> str:
    """Build the HTML page.

    Args:
        samples: (task, class folder) → thumbnails as JPEGs.
        class_names: class folder → class name shown to CLIP.
    """
    header = "".join(f"<th>{title}</th>" for title, _ in _COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(task))}</tr>" for task in tasks)
    parts = [
        f"<h1>{escape(name)}: {sum(task.images for task in tasks):,} images in {len(tasks)} tasks</h1>",
        f"<table><tr>{header}</tr>{rows}</table>",
        "<h2>Findings</h2>",
        *(_finding(finding) for finding in findings),
        *([] if findings else ["<p>No findings.</p>"]),
        "<h2>Samples</h2>",
        _samples([task.task for task in tasks], samples, class_names),
    ]
    return html_page(f"{name}: data check", "\n".join(parts), PAGE_STYLE)


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


def _finding(finding: Finding) -> str:
    lines = [escape(_truncate(line, MAX_PAGE_CHARACTERS)) for line in finding.examples[:MAX_PAGE_EXAMPLES]]
    if (num_hidden := len(finding.examples) - MAX_PAGE_EXAMPLES) > 0:
        lines.append(f"and {num_hidden:,} more; all are in check.json")
    return (
        f'<div class="finding {finding.severity}"><p><b>{escape(finding.title)}</b></p>'
        f"<p>{escape(finding.remedy)}</p><details><summary>examples</summary><pre>{chr(10).join(lines)}</pre></details></div>"
    )


def _samples(
    tasks: Sequence[str], samples: Mapping[tuple[str, str], Sequence[bytes]], class_names: Mapping[str, str]
) -> str:
    header = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    lines = []
    for folder in sorted({folder for _, folder in samples}):
        cells = ("".join(map(_thumbnail, samples.get((task, folder), ()))) for task in tasks)
        lines.append(f"<tr><td>{escape(class_names[folder])}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<table class="samples"><tr><th></th>{header}</tr>{"".join(lines)}</table>'


def _thumbnail(jpeg: bytes) -> str:
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _truncate(line: str, limit: int) -> str:
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
