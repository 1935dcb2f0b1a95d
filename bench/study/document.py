"""A report as data, and as Markdown. Text may hold Markdown of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Cells as text; the first column and those in `left` are left-aligned, all others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()


class Picture(NamedTuple):
    """A drawing, which lies beside the report as NAME.svg."""

    name: str
    alt: str  # what it shows, for those who do not see it
    svg: str


class Folded(NamedTuple):
    """Something long, shown when asked for."""

    summary: str
    parts: Sequence[str | Table]


Part = str | Table | Picture | Folded


class Section(NamedTuple):
    title: str
    parts: Sequence[Part]
    level: int = 2  # of the heading


def markdown(title: str, sections: Iterable[Section]) -> str:
    """Return the report as a Markdown file that stands beside its pictures."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"{'#' * section.level} {section.title}")
        blocks += map(block, section.parts)
    return "\n\n".join(blocks) + "\n"


def block(part: Part) -> str:
    if isinstance(part, Table):
        marks = ["---" if not number or name in part.left else "---:" for number, name in enumerate(part.header)]
        lines = [part.header, marks, *part.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if isinstance(part, Picture):
        return f"![{part.alt}]({part.name}.svg)"
    if isinstance(part, Folded):
        return "\n\n".join([f"<details><summary>{part.summary}</summary>", *map(block, part.parts), "</details>"])
    return part
