"""What a data check found, as tables for the terminal and as one HTML page with samples of every class."""

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
from pipeline.report.grouping_page import STYLE

SHOWN = 5
"""Examples of a finding in the terminal."""
SHOWN_ON_PAGE = 200
LINE, LINE_ON_PAGE = 150, 1000
"""Characters of an example: a group of images that look alike may be thousands."""
COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
PAGE_STYLE = (
    STYLE
    + """
.error { background: #fbdcdc; } .warning { background: #fff4d6; } .note { background: #e8f0f8; }
.finding { padding: .5rem .9rem; margin: .5rem 0; } .finding p { margin: .2rem 0; } .finding pre { overflow-x: auto; }
.samples td { padding: .1rem .4rem; vertical-align: middle; } .samples img { display: inline-block; margin: 0 .1rem; }
.samples th { position: sticky; top: 0; background: #fff; }
"""
)


@dataclass(frozen=True)
class TaskOverview:
    task: str
    images: int
    """That can be decoded."""
    classes: int
    smallest_class: int
    largest_class: int
    median_size: str
    formats: str
    modes: str


def task_overviews(images: Sequence[CheckedImage], classes: Mapping[str, Sequence[str]]) -> list[TaskOverview]:
    """One a task, in order."""
    of_task: dict[str, list[CheckedImage]] = defaultdict(list)
    for of in images:
        if of.stats:
            of_task[of.image.task].append(of)
    found = []
    for task, names in classes.items():
        whole = [of.stats for of in of_task[task] if of.stats]
        counts = Counter(of.image.class_folder for of in of_task[task])
        of_classes = [counts[name] for name in names]
        size = f"{median(f.width for f in whole):.0f} x {median(f.height for f in whole):.0f}" if whole else ""
        found.append(
            TaskOverview(
                task,
                len(whole),
                len(names),
                min(of_classes),
                max(of_classes),
                size,
                _most_common(stats.format for stats in whole),
                _most_common(stats.mode for stats in whole),
            )
        )
    return found


def summary_line(findings: Sequence[Finding]) -> str:
    """How many there are of each severity."""
    counts = Counter[str](finding.severity for finding in findings)
    told = [f"{counts[of]} {of}{'s' if counts[of] > 1 else ''}" for of in COLORS if counts[of]]
    return ", ".join(told) or "nothing stands out"


def check_tables(name: str, tasks: Sequence[TaskOverview], findings: Sequence[Finding]) -> Group:
    """For the terminal."""
    table = Table(title=f"{escape_markup(name)}: {sum(of.images for of in tasks):,} images in {len(tasks)} tasks")
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify)
    for of in tasks:
        table.add_row(*(escape_markup(cell) for cell in _cells(of)))
    told = Table(show_header=False, box=None, padding=(0, 1, 1, 1))
    for finding in findings:
        lines = [f"[bold]{escape_markup(finding.title)}[/]", escape_markup(finding.remedy)]
        lines += [f"[dim]{escape_markup(_shortened(line, LINE))}[/]" for line in finding.examples[:SHOWN]]
        if (more := len(finding.examples) - SHOWN) > 0:
            lines.append(f"[dim]and {more:,} more[/]")
        told.add_row(f"[{COLORS[finding.severity]}]{finding.severity}[/]", "\n".join(lines))
    return Group(table, told) if findings else Group(table)


def check_page(
    name: str,
    tasks: Sequence[TaskOverview],
    findings: Sequence[Finding],
    samples: Mapping[tuple[str, str], Sequence[bytes]],
    class_names: Mapping[str, str],
) -> str:
    """
    Args:
        samples: (task, class folder) → thumbnails as JPEGs.
        class_words: class folder → words shown to CLIP.
    """
    header = "".join(f"<th>{title}</th>" for title, _ in _COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(of))}</tr>" for of in tasks)
    parts = [
        f"<h1>{escape(name)}: {sum(of.images for of in tasks):,} images in {len(tasks)} tasks</h1>",
        f"<table><tr>{header}</tr>{rows}</table>",
        "<h2>What was found</h2>",
        *(_finding(finding) for finding in findings),
        *([] if findings else ["<p>Nothing stands out.</p>"]),
        "<h2>Samples</h2>",
        _samples([of.task for of in tasks], samples, class_names),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}: data check</title>'
        f"<style>{PAGE_STYLE}</style>" + "\n".join(parts) + "\n</html>\n"
    )


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("task", "left"),
    ("images", "right"),
    ("classes", "right"),
    ("a class", "right"),
    ("median size", "right"),
    ("formats", "left"),
    ("modes", "left"),
)


def _cells(of: TaskOverview) -> list[str]:
    range_of_class = f"{of.smallest_class:,} to {of.largest_class:,}"
    return [of.task, f"{of.images:,}", f"{of.classes:,}", range_of_class, of.median_size, of.formats, of.modes]


def _most_common(values: Any) -> str:
    counts = Counter(values)
    total = sum(counts.values())
    return ", ".join(
        name if count == total else f"{name} {100 * count / total:.2g} %" for name, count in counts.most_common(3)
    )


def _finding(finding: Finding) -> str:
    shown = [escape(_shortened(line, LINE_ON_PAGE)) for line in finding.examples[:SHOWN_ON_PAGE]]
    if (more := len(finding.examples) - SHOWN_ON_PAGE) > 0:
        shown.append(f"and {more:,} more, all in check.json")
    lines = "\n".join(shown)
    return (
        f'<div class="finding {finding.severity}"><p><b>{escape(finding.title)}</b></p>'
        f"<p>{escape(finding.remedy)}</p><details><summary>which</summary><pre>{lines}</pre></details></div>"
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


def _shortened(line: str, most: int) -> str:
    """At most `most` characters of it, and a sign that there are more."""
    return line if len(line) <= most else f"{line[: most - 1]}…"
