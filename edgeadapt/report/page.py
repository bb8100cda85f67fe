"""One HTML page with everything in it: style, charts, tables. It follows the reader's choice of light or dark."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeadapt.errors import UsageError
from edgeadapt.report.charts import STYLE, escape

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --text: #16202c; --soft: #5b6775; --line: #e4e8ec; --band: #f3f5f8; --c0: #d2570f; --c1: #1667c7;
  --c2: #23803a; --c3: #7d43bd; --c4: #6a7480; --c5: #0a8588; --c6: #b8324c; --c7: #8a6a08; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12171d; --text: #e8edf2; --soft: #98a5b3; --line: #28313b; --band: #191f27; --c0: #f59350; --c1: #62a8f7;
    --c2: #68c77b; --c3: #b58cf0; --c4: #a2acb8; --c5: #4bcacd; --c6: #f0788c; --c7: #d6b548; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 44px 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 74ch; }
.lead { font-size: 17px; }
.figures { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 26px 0 8px; padding: 0; }
.figures div { min-width: 110px; }
.figures dt { color: var(--soft); font-size: 14px; }
.figures dd { margin: 0; font-size: 28px; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures .c0 dd { color: var(--c0); } .figures .c1 dd { color: var(--c1); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0 0; min-width: 60%; }
th, td { padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.words td:first-child { color: var(--soft); white-space: nowrap; vertical-align: top; }
tr.total td { font-weight: 600; border-bottom: 0; }
footer { margin-top: 52px; color: var(--soft); font-size: 13px; }
"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the last row stands out if `total`; cells of `words` are wrapped and not aligned as numbers are."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: bool = False
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, a chart (an SVG element, taken as it is) and a table; each but the heading may be left out."""

    heading: str
    text: str = ""
    chart: str = ""
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title, lead: what it is about, and the finding in a sentence.
        figures: (name, value, colour) shown large; colour is "c0", "c1" or "".
        sections: in their order.
        footer: how it was made.
    """

    title: str
    lead: str
    figures: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = field(default=())
    footer: str = ""


def render(page: Page) -> str:
    """The page as HTML that is also well-formed XML."""
    figures = "".join(f'<div class="{kind}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value, kind in page.figures)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{escape(page.title)}</title>",
        f"<style>{_CSS}{STYLE}</style></head>",
        f'<body><main><h1>{escape(page.title)}</h1><p class="lead">{escape(page.lead)}</p>',
        f'<dl class="figures">{figures}</dl>' if figures else "",
        *map(_section, page.sections),
        f"<footer>{escape(page.footer)}</footer>" if page.footer else "",
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write(folder: str | os.PathLike[str], page: Page, data: Mapping[str, Any]) -> Path:
    """Writes report.html and report.json into a folder, which is made if it is not there.

    Returns:
        the path of report.html.

    Raises:
        UsageError: they cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (target / "report.html").write_text(render(page), encoding="utf-8")
    except OSError as reason:
        raise UsageError(f"the report cannot be written to {target}: {reason.strerror}", "give a folder that can be written with --report") from None
    return target / "report.html"


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    table = _table(section.table) if section.table else ""
    return f"<section><h2>{escape(section.heading)}</h2>{text}{section.chart}{table}</section>"


def _table(table: Table) -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = []
    for index, row in enumerate(table.rows):
        kind = ' class="total"' if table.total and index == len(table.rows) - 1 else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    style = ' class="words"' if table.words else ""
    return f'<div class="wide"><table{style}><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
