"""The grouping as one HTML page with embedded figures: the groups, their stability, and the next best partitions."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.grouping.text import format_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .note { background: #fff4d6; padding: .6rem .9rem; margin: .4rem 0; }
.group { background: #e8f0f8; padding: .1rem .6rem; margin: .15rem .5rem .15rem 0; display: inline-block; }
"""


def grouping_page(result: Mapping[str, Any], search: str, figures: Mapping[str, Figure]) -> str:
    """Return the page as HTML.

    Args:
        result: contents of grouping.json.
        search: text of `describe_search`.
        figures: title of a section → its figure.
    """
    stability = result["stability"]
    frequency = next((row["frequency"] for row in stability["resampled"] if row["groups"] == result["groups"]), 0.0)
    parts = [
        f"<h1>Groups of {len(result['tasks'])} tasks</h1>",
        "<p>"
        + "".join(f'<span class="group">{escape(format_groups([group]))}</span>' for group in result["groups"])
        + "</p>",
        f"<p>{escape(search)}. Objective <code>{escape(result['objective'])}</code> of "
        f"<code>{escape(result['affinity_kind'])}</code> affinities, averaged over {result['num_snapshots']} gradient "
        f"snapshots. {100 * frequency:.0f} % of {stability['num_resamples']} bootstrap resamples of the snapshots "
        "give the same groups.</p>",
        *(f'<p class="note">{escape(warning)}</p>' for warning in result["warnings"]),
    ]
    for title, figure in figures.items():
        parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{_png(figure)}">')
    parts += [
        "<h2>Partitions over bootstrap resamples</h2>",
        _table(
            ("groups", "frequency"),
            [(format_groups(row["groups"]), f"{100 * row['frequency']:.0f} %") for row in stability["resampled"]],
        ),
        "<h2>Partition by phase of the training</h2>",
        _table(
            ("steps", "groups"),
            [
                (f"{row['first_step']} to {row['last_step']}", format_groups(row["groups"]))
                for row in stability["over_training"]
            ],
        ),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Task groups</title><style>{STYLE}</style>{body}\n'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()
