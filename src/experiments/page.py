"""A report as one file: pictures inside, no script, nothing from elsewhere; and the same as Markdown."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .tables import Table, in_cell

_PIXELS = 96
"""Of an inch, as browsers count."""
_STYLE = """
:root { --ink: #222; --soft: #667; --line: #d5d9de }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem }
.from { color: var(--soft); margin: .2rem 0 1.2rem; overflow-wrap: anywhere }
.finding { font-size: 1.05rem; border-left: 4px solid #0072b2; padding: .3rem .9rem; margin: 1rem 0 }
figure { margin: 0 } img { max-width: 100%; height: auto }
figcaption { color: var(--soft); font-size: .9rem; max-width: 60rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .22rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
td:first-child { white-space: nowrap }
th { border-bottom: 2px solid var(--ink) } .number { text-align: right; white-space: nowrap }
li { margin: .25rem 0; max-width: 60rem }
pre { font-size: .8rem; background: #f4f5f7; padding: .8rem; overflow-x: auto }
@page { size: A4 landscape; margin: 12mm }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt } h2 { break-after: avoid }
  figure, tr { break-inside: avoid } thead { display: table-header-group }
  img { max-height: 165mm } .finding ~ figure:first-of-type img { max-height: 120mm }
  .wide { overflow: visible } pre { white-space: pre-wrap }
}
"""


class Picture(NamedTuple):
    """A figure as it stands in a report."""

    title: str
    caption: str
    file: str
    png: bytes
    width: float
    """In inches."""


class Report(NamedTuple):
    """All that a report says, in its order."""

    title: str
    source: str
    findings: Sequence[str]
    parts: Sequence[Picture | Table]
    notes: Sequence[str]
    settings: str


def as_html(report: Report) -> str:
    """One page that loads nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [_picture(part) if isinstance(part, Picture) else _table(part) for part in report.parts]
    settings = f"<h2>The sweep as it was asked for</h2><pre>{escape(report.settings)}</pre>" if report.settings else ""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head>",
            f'<body><h1>{escape(report.title)}</h1><p class="from">{escape(report.source)}</p>',
            *(f'<p class="finding">{escape(finding)}</p>' for finding in report.findings),
            *parts,
            "<h2>Notes</h2><ul>",
            *(f"<li>{escape(note)}</li>" for note in report.notes),
            f"</ul>{settings}</body></html>",
            "",
        ]
    )


def _picture(picture: Picture) -> str:
    data = b64encode(picture.png).decode("ascii")
    return (
        f"<h2>{escape(picture.title)}</h2><figure>"
        f'<img alt="{escape(picture.title)}" width="{_PIXELS * picture.width:.0f}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    body = f'<div class="wide">{table.html()}</div>' if table.rows else "<p>None.</p>"
    return f"<h2>{escape(table.title)}</h2>{body}"


def as_markdown(report: Report) -> str:
    """The same, with the pictures as files beside it."""
    lines = [f"# {in_cell(report.title)}", "", in_cell(report.source), ""]
    lines += [line for finding in report.findings for line in (f"**{in_cell(finding)}**", "")]
    for part in report.parts:
        lines += [f"## {in_cell(part.title)}", ""]
        if isinstance(part, Picture):
            lines += [f"![{in_cell(part.title)}]({part.file})", "", in_cell(part.caption), ""]
        else:
            lines += [part.markdown() if part.rows else "None.", ""]
    lines += ["## Notes", "", *(f"- {in_cell(note)}" for note in report.notes), ""]
    if report.settings:
        indented = (f"    {line}" for line in report.settings.splitlines())
        lines += ["## The sweep as it was asked for", "", *indented, ""]
    return "\n".join(lines)
