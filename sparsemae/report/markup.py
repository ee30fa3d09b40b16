"""The pieces of a page: escaped text, tables, pictures. Whatever comes from a user passes through `escaped`."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def escaped(text: object) -> str:
    """Text for HTML, in attributes too; what is no Unicode, as some file names are not, becomes a question mark."""
    return html.escape(str(text).encode(errors="replace").decode())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Of cells that are HTML already; the first ``words`` columns are text, the others numbers, set to the right."""
    sides = ["" if column < words else " class=n" for column in range(len(head))]
    line = "".join(f"<th{side}>{cell}</th>" for side, cell in zip(sides, head, strict=True))
    body = (
        "<tr>" + "".join(f"<td{side}>{cell}</td>" for side, cell in zip(sides, cells, strict=True)) + "</tr>"
        for cells in rows
    )  # fmt: skip
    return f"<div class=scroll><table><thead><tr>{line}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def section(title: str, content: str, about: str = "") -> str:
    """A part of the page; empty content leaves it out."""
    said = f"<p class=about>{escaped(about)}</p>" if about else ""
    return f"<section><h2>{escaped(title)}</h2>{said}{content}</section>" if content else ""


def details(title: str, content: str) -> str:
    """What is folded away; empty content leaves it out."""
    return f"<details><summary>{escaped(title)}</summary>{content}</details>" if content else ""


def pictures(shown: Sequence[Mapping[str, Any]]) -> str:
    """Figures of ``picture`` (a data URI), ``width``, ``title``, ``file``, ``note``; ``wide`` ones in wider columns."""
    figures = []
    for one in shown:
        name = escaped(one["title"]).replace("/", "/<wbr>")
        title = f'<b title="{escaped(one["file"])}">{name}</b>' if name else ""
        note = f"<span>{escaped(one['note'])}</span>" if one["note"] else ""
        small = " class=pixels" if one["width"] <= 64 else ""
        alt = escaped(f"{one['title']} {one['note']}".strip())
        caption = f"<figcaption>{title}{note}</figcaption>" if title or note else ""
        figures.append(f'<figure><img{small} src="{escaped(one["picture"])}" alt="{alt}">{caption}</figure>')
    wide = " wide" if any(one.get("wide") for one in shown) else ""
    return f'<div class="pictures{wide}">{"".join(figures)}</div>' if figures else ""
