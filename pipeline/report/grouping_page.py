"""The grouping as one HTML page with its pictures inside: what was found, how sure it is, what comes close."""

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
    """
    Args:
        result: as in grouping.json.
        search: how the groups were found, in words.
        figures: title of a section → its picture.
    """
    sure = result["stability"]
    agreeing = next((of["share"] for of in sure["resampled"] if of["groups"] == result["groups"]), 0.0)
    parts = [
        f"<h1>Groups of {len(result['tasks'])} tasks</h1>",
        "<p>"
        + "".join(f'<span class="group">{escape(format_groups([group]))}</span>' for group in result["groups"])
        + "</p>",
        f"<p>{escape(search)}. Objective <code>{escape(result['objective'])}</code> of "
        f"<code>{escape(result['affinity_kind'])}</code> affinities, the mean of {result['num_snapshots']} gradient "
        f"snapshots. Searching again on {sure['num_resamples']} resamples of the snapshots gives these groups "
        f"{100 * agreeing:.0f} % of the time.</p>",
        *(f'<p class="note">{escape(warning)}</p>' for warning in result["warnings"]),
    ]
    for title, figure in figures.items():
        parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{_png(figure)}">')
    parts += [
        "<h2>What resampled snapshots find</h2>",
        _table(
            ("groups", "share"),
            [(format_groups(of["groups"]), f"{100 * of['share']:.0f} %") for of in sure["resampled"]],
        ),
        "<h2>What each part of the training alone would find</h2>",
        _table(
            ("steps", "groups"),
            [(f"{of['first_step']} to {of['last_step']}", format_groups(of["groups"])) for of in sure["over_training"]],
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
