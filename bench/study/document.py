"""A report as data, and how it becomes Markdown and one self-contained HTML page.

Text may hold `code`, **bold** and [links](where); nothing else of Markdown.
"""

from __future__ import annotations

import html as escaping
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Cells as text; the first column and those in `left` are left-aligned, all others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()


class Picture(NamedTuple):
    """A drawing, which lies beside the Markdown as NAME.svg and NAME.png, and inside the HTML page."""

    name: str
    alt: str  # what it shows, for those who do not see it
    svg: str = ""
    png: bytes = b""


class Folded(NamedTuple):
    """Something long, shown when asked for."""

    summary: str
    table: Table


Part = str | Table | Picture | Folded


class Section(NamedTuple):
    title: str
    parts: Sequence[Part]
    level: int = 2  # of the heading


def markdown(title: str, sections: Iterable[Section]) -> str:
    """The report as a Markdown file that stands beside its pictures."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"{'#' * section.level} {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(markdown_table(part))
            elif isinstance(part, Picture):
                blocks.append(f"![{part.alt}]({part.name}.svg)")
            elif isinstance(part, Folded):
                blocks.append(f"<details><summary>{escaping.escape(part.summary)}</summary>")
                blocks += [markdown_table(part.table), "</details>"]
            else:
                blocks.append(part)
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    marks = ["---" if left else "---:" for left in _left(table)]
    lines = [table.header, marks, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def html(title: str, sections: Iterable[Section]) -> str:
    """The report as one HTML page that needs no other file."""
    sections = list(sections)
    body = [f"<h1>{_inline(title)}</h1>", "<nav><ul>"]
    body += [f'<li class="h{s.level}"><a href="#{_anchor(s.title)}">{_inline(s.title)}</a></li>' for s in sections]
    body.append("</ul></nav>")
    for section in sections:
        body.append(f'<h{section.level} id="{_anchor(section.title)}">{_inline(section.title)}</h{section.level}>')
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif isinstance(part, Picture):
                body.append(f'<figure role="img" aria-label="{escaping.escape(part.alt)}">{_own_ids(part)}</figure>')
            elif isinstance(part, Folded):
                body.append(f"<details><summary>{_inline(part.summary)}</summary>{_html_table(part.table)}</details>")
            else:
                body.append(f"<p>{_inline(part)}</p>")
    page = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_inline(title)}</title>\n'
    page += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    return f"{page}<style>{_STYLE}</style></head>\n<body><main>\n" + "\n".join(body) + "\n</main></body></html>\n"


def without_pictures(page: str) -> str:
    """The page as it is apart from drawings, whose strokes depend on the version of the library that draws."""
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def _html_table(table: Table) -> str:
    kinds = ["" if left else ' class="n"' for left in _left(table)]

    def line(cells: Sequence[str], tag: str) -> str:
        made = (f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    head, rows = line(table.header, "th"), "\n".join(line(row, "td") for row in table.rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'


def _left(table: Table) -> list[bool]:
    return [number == 0 or heading in table.left for number, heading in enumerate(table.header)]


def _inline(text: str) -> str:
    text = escaping.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)


def _own_ids(picture: Picture) -> str:
    """The drawing without its XML head, and with names that no other drawing on the page has."""
    svg = picture.svg[picture.svg.index("<svg") :].strip()
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, f"{mark}{picture.name}-")
    return svg


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0; }
main { max-width: 64rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; } h3 { margin-top: 2.25rem; }
p { max-width: 46rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: .75rem 0; }
th, td { padding: .3rem .55rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
th { border-bottom: 2px solid #888; } .n { text-align: right; white-space: nowrap; }
code { font-size: .85em; background: #f3f3f3; padding: .05em .25em; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; } details { margin: .5rem 0; }
summary { cursor: pointer; color: #0550ae; } nav ul { list-style: none; padding: 0; }
nav .h3 { padding-left: 1.25rem; font-size: .9rem; }
"""
