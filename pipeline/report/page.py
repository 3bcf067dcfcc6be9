"""HTML pages: one self-contained file without scripts, readable on a phone, on a desktop, in the dark and on paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1f252b; --muted: #5b6570; --line: #d3d9df; --paper: #fff; --accent: #1f5a85;
  --tint: #e8f0f8; --warning: #fff4d6; --error: #fbdcdc; --miss: #c8702a; }
@media (prefers-color-scheme: dark) { @media screen { :root { --text: #dfe4e9; --muted: #9aa5b0; --line: #3a434c;
  --paper: #14181c; --accent: #6fb1e0; --tint: #1f2f3d; --warning: #40361a; --error: #4a2424; --miss: #e39a5b; } } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
a { color: var(--accent); } code, pre { font-size: .875em; }
pre { overflow-x: auto; background: var(--tint); padding: .6rem .9rem; margin: .4rem 0; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid var(--muted); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } img.figure { background: #fff; }
.wide { overflow-x: auto; } .muted { color: var(--muted); }
.note { background: var(--warning); padding: .6rem .9rem; margin: .4rem 0; }
.group { background: var(--tint); padding: .1rem .6rem; margin: .15rem .5rem .15rem 0; display: inline-block; }
summary { cursor: pointer; }
@page { margin: 14mm; }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; print-color-adjust: exact; }
  h1, h2, h3 { break-after: avoid; } figure, img, tr, svg, .note { break-inside: avoid; } .wide { overflow: visible; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } details:not([open]), .screen { display: none; } }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Return a page as HTML.

    Args:
        body: HTML.
        style: rules besides STYLE.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    """Return a table of escaped text, which scrolls sideways where it does not fit.

    Args:
        numbers: whether all columns but the first are numbers, which are aligned right.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        attribute = ' class="number"' if numbers else ""
        return "".join(
            f"<{tag}{attribute if column else ''}>{escape(value)}</{tag}>" for column, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", header)}</tr>{lines}</table></div>'


def embedded_image(data: bytes, alt: str, kind: str = "png", attributes: str = "") -> str:
    """Return an image element with its content."""
    content = base64.b64encode(data).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{content}"{attributes}>'
