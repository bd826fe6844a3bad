"""Sections of text, tables and pictures as Markdown and as one self-contained HTML page."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from .style import STYLE
from .tables import Cell, Column, Group, Table

MARKS = {"above": "▲", "below": "▼", "": ""}
# What Markdown would read as more than a letter, in texts that come from files and folders.
_SPECIAL = re.compile(r"([\\`*\[\]<>|&])")


@dataclass(frozen=True)
class Picture:
    """A drawing. `name` is the file of the PNG, the SVGs are for a light and a dark page, `text` describes it."""

    name: str
    png: bytes
    light: bytes
    dark: bytes
    text: str


Part = str | Table | Picture


@dataclass(frozen=True)
class Section:
    title: str
    parts: list[Part]
    level: int = 2


# ---- Markdown --------------------------------------------------------------------------------


def to_markdown(sections: Sequence[Section], title: str) -> str:
    blocks = [f"# {_plain(title)}"]
    for section in sections:
        blocks.append(f"{'#' * (section.level + 1)} {_plain(section.title)}")
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(markdown_table(part))
            elif isinstance(part, Picture):
                blocks.append(f"![{_plain(part.text)}]({part.name})")
            else:
                blocks.append(_plain(part))
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    """Return a Markdown table. Titles of groups are rows of their own, and muted cells are in italics."""
    headers = [_plain(f"{c.over} {c.header}".strip()) for c in table.columns]
    lines = [_row(headers), "|" + "|".join("-:" if c.numeric else ":-" for c in table.columns) + "|"]
    for group in table.groups:
        if group.title:
            lines.append(_row([f"**{_plain(group.title)}**", *[""] * (len(table.columns) - 1)]))
        lines += [_row([_markdown_cell(cell) for cell in row]) for row in group.rows]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cell(cell: Cell) -> str:
    text = _plain(f"{cell.text} {cell.spread}")
    if cell.mark:
        text = f"{text} {MARKS[cell.mark]}"
    if cell.bold:
        text = f"**{text}**"
    return f"*{text}*" if cell.muted and any(c.isalnum() for c in text) else text


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


# ---- HTML ------------------------------------------------------------------------------------


def to_html(sections: Sequence[Section], title: str) -> str:
    """Return one page that holds its style and pictures, needs no scripts and loads nothing."""
    body = [f"<h1>{_escaped(title)}</h1>"]
    for section in sections:
        level = section.level + 1
        body.append("<section>")
        body.append(f"<h{level}>{_escaped(section.title)}</h{level}>")
        body += [_html_part(part) for part in section.parts]
        body.append("</section>")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_escaped(title)}</title>",
            f"<style>\n{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _html_part(part: Part) -> str:
    if isinstance(part, Table):
        return html_table(part)
    if isinstance(part, Picture):
        return (
            "<figure><picture>"
            f'<source media="screen and (prefers-color-scheme: dark)" srcset="{_data(part.dark)}">'
            f'<img src="{_data(part.light)}" alt="{_escaped(part.text)}">'
            "</picture></figure>"
        )
    return f"<p>{_escaped(part)}</p>"


def _data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def html_table(table: Table) -> str:
    """Return an HTML table in a box that scrolls sideways on a narrow screen; each group is a tbody."""
    rows = [row for group in table.groups for row in group.rows]
    columns = [
        _HtmlColumn(column, any(row[c].spread for row in rows), any(row[c].mark for row in rows))
        for c, column in enumerate(table.columns)
    ]
    lines = ['<div class="wide"><table>', "<thead>", *_head(columns), "</thead>"]
    lines += [line for group in table.groups for line in _body(group, columns)]
    return "\n".join([*lines, "</table></div>"])


class _HtmlColumn(NamedTuple):
    """A column, and what may follow a number in it: that takes the same room in every row, so that the numbers stand
    under each other."""

    column: Column
    spread: bool
    mark: bool

    def content(self, text: str, spread: str = "", mark: str = "") -> str:
        if self.spread:
            text += f'<span class="spread">{_escaped(spread)}</span>'
        if self.mark:
            title = f' title="{mark} by more than the tolerance"' if mark else ""
            text += f'<span class="mark"{title}>{MARKS[mark]}</span>'
        return text

    def kind(self, *, muted: bool = False) -> str:
        given = {"number": self.column.numeric, "whole": self.column.whole, "muted": muted}
        classes = [name for name, has in given.items() if has]
        return f' class="{" ".join(classes)}"' if classes else ""


def _head(columns: Sequence[_HtmlColumn]) -> list[str]:
    rows = []
    if any(c.column.over for c in columns):
        cells = [(over, len(list(own))) for over, own in groupby(columns, key=lambda c: c.column.over)]
        spans = "".join(f'<th class="over" colspan="{n}" scope="colgroup">{_escaped(over)}</th>' for over, n in cells)
        rows.append(f"<tr>{spans}</tr>")
    names = "".join(f'<th{c.kind()} scope="col">{c.content(_escaped(c.column.header))}</th>' for c in columns)
    return [*rows, f"<tr>{names}</tr>"]


def _body(group: Group, columns: Sequence[_HtmlColumn]) -> list[str]:
    lines = ["<tbody>"]
    if group.title:
        title = _escaped(group.title)
        lines.append(f'<tr class="group"><th colspan="{len(columns)}" scope="rowgroup">{title}</th></tr>')
    for row in group.rows:
        cells = "".join(_html_cell(cell, column) for cell, column in zip(row, columns, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return [*lines, "</tbody>"]


def _html_cell(cell: Cell, column: _HtmlColumn) -> str:
    text = f"<b>{_escaped(cell.text)}</b>" if cell.bold else _escaped(cell.text)
    return f"<td{column.kind(muted=cell.muted)}>{column.content(text, cell.spread, cell.mark)}</td>"


def _escaped(text: str) -> str:
    return html.escape(" ".join(text.split()))
