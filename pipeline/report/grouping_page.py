"""The grouping as one HTML page with embedded figures: the groups, their stability, and the next best partitions."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.data.names import pluralize
from pipeline.grouping.text import first_snapshots, format_groups
from pipeline.report.page import embedded_image, html_page, html_table


def grouping_page(result: Mapping[str, Any], search: str, figures: Mapping[str, tuple[bytes, int]]) -> str:
    """Return the page as HTML.

    Args:
        result: contents of grouping.json.
        search: text of `describe_search`.
        figures: title of a section → its figure as PNG, and the width in CSS pixels.
    """
    stability = result["stability"]
    frequency = next((row["frequency"] for row in stability["resampled"] if row["groups"] == result["groups"]), 0.0)
    parts = [
        f"<h1>Groups of {pluralize(len(result['tasks']), 'task')}</h1>",
        "<p>"
        + "".join(f'<span class="group">{escape(format_groups([group]))}</span>' for group in result["groups"])
        + "</p>",
        f"<p>{escape(search)}. Objective <code>{escape(result['objective'])}</code> of "
        f"<code>{escape(result['affinity_kind'])}</code> affinities, averaged over {result['num_snapshots']} gradient "
        f"snapshots. {100 * frequency:.0f} % of {stability['num_resamples']} bootstrap resamples of the snapshots "
        f"give the same groups.</p><p>{_describe_early(stability, result['num_snapshots'])}</p>",
        *(f'<p class="note">{escape(warning)}</p>' for warning in result["warnings"]),
    ]
    for title, (png, width) in figures.items():
        image = embedded_image(png, title, attributes=f' class="figure" width="{width}"')
        parts.append(f"<h2>{escape(title)}</h2>{image}")
    parts += [
        "<h2>Partitions over bootstrap resamples</h2>",
        html_table(
            ("groups", "frequency"),
            [(format_groups(row["groups"]), f"{100 * row['frequency']:.0f} %") for row in stability["resampled"]],
        ),
        "<h2>Partition by phase of the training</h2>",
        html_table(
            ("steps", "groups"),
            [
                (f"{row['first_step']} to {row['last_step']}", format_groups(row["groups"]))
                for row in stability["over_training"]
            ],
        ),
    ]
    return html_page("Task groups", "\n".join(parts))


def _describe_early(stability: Mapping[str, Any], num_snapshots: int) -> str:
    """Return a sentence, as HTML, on how much of the affinities is from the first snapshots."""
    early = stability["early"]
    count = f"{first_snapshots(early['num_snapshots'], num_snapshots)} (to step {early['last_step']})"
    text = f"{100 * early['share']:.0f} % of the affinities is from {count}"
    if early["share"] < 0.5 or num_snapshots < 10:
        return f"{text}."
    return f"{text}: these decide the groups. With <code>--grouping.affinity cosine</code> all have equal weight."
