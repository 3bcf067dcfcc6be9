"""The grouping as one HTML page with embedded figures: the groups, their stability, and the next best partitions."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pipeline.data.names import pluralize
from pipeline.grouping.text import affinity_title, first_snapshots, format_groups
from pipeline.report.page import embedded_image, html_page, html_table


def grouping_page(result: Mapping[str, Any], search: str, figures: Mapping[str, tuple[bytes, int]]) -> str:
    """Return the page as HTML.

    Args:
        result: contents of grouping.json.
        search: text of `describe_search`.
        figures: title of a section → its figure as PNG, and the width in CSS pixels.
    """
    stability, training = result["stability"], result.get("training")
    frequency = next((row["frequency"] for row in stability["resampled"] if row["groups"] == result["groups"]), 0.0)
    title = affinity_title(result["candidates"][0])
    parts = [
        f"<h1>Groups of {pluralize(len(result['tasks']), 'task')}</h1>",
        "<p>"
        + "".join(f'<span class="group">{escape(format_groups([group]))}</span>' for group in result["groups"])
        + "</p>",
        f"<p>{escape(search)}. Objective <code>{escape(result['objective'])}</code> of <code>{escape(title)}</code> "
        f"affinities, from {stability['num_resampled']:,} {stability['resampled_from']}. {100 * frequency:.0f} % of "
        f"{stability['num_resamples']} bootstrap resamples of the {stability['resampled_from']} give the same "
        "groups.</p>",
        *([f"<p>{_describe_early(training['early'], stability['num_resampled'])}</p>"] if training else []),
        *(f'<p class="note">{escape(warning)}</p>' for warning in result["warnings"]),
        "<h2>Groups by each affinity</h2>",
        html_table(
            ("affinity", "groups"),
            [
                (
                    affinity_title(item) + " (taken)" * item["is_taken"],
                    format_groups(item["groups"]),
                )
                for item in result["candidates"]
            ],
        ),
    ]
    if result["gains"]:
        parts += [
            "<h2>Gains from each other's prompts</h2>",
            "<p>Zero-shot loss minus loss (nats) on a column's training images, under the prompts of a row's task "
            "alone. The affinity of two tasks is the mean of their two gains.</p>",
            html_table(
                ("prompts of", *result["tasks"]),
                [
                    (task, *(f"{gain:+.3f}".replace("-", "−") for gain in gains))
                    for task, gains in zip(result["tasks"], result["gains"])
                ],
                numbers=True,
            ),
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
    ]
    if training:
        parts += [
            "<h2>Partition by phase of the training</h2>",
            html_table(
                ("steps", "groups"),
                [
                    (f"{row['first_step']} to {row['last_step']}", format_groups(row["groups"]))
                    for row in training["phases"]
                ],
            ),
        ]
    return html_page("Task groups", "\n".join(parts))


def _describe_early(early: Mapping[str, Any], num_snapshots: int) -> str:
    """Return a sentence, as HTML, on how much of the affinities is from the first snapshots."""
    count = f"{first_snapshots(early['num_snapshots'], num_snapshots)} (to step {early['last_step']})"
    text = f"{100 * early['share']:.0f} % of the affinities is from {count}"
    if early["share"] < 0.5 or num_snapshots < 10:
        return f"{text}."
    remedy = "With <code>--grouping.gradient_similarity cosine</code> all have equal weight."
    return f"{text}: these decide the groups. {remedy}"
