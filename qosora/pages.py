"""Pictures, and HTML files that hold them: one file each, which needs no network."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Iterable
from typing import Any

from qosora.errors import ConfigError

__all__ = ["can_draw", "page", "picture", "png", "require_plots", "rows"]

_STYLE = (  # on a phone, pictures and tables keep a size that can be read, and scroll sideways
    "body{font:15px system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "figure,div{margin:1em 0;overflow-x:auto}img{width:100%;min-width:720px}table{border-collapse:collapse}"
    "td,th{padding:2px 14px 2px 0;text-align:right}td:first-child,th:first-child{text-align:left}"
)


def can_draw() -> bool:
    """Say whether there is matplotlib."""
    return importlib.util.find_spec("matplotlib") is not None


def require_plots() -> None:
    """Raise ConfigError if nothing can be drawn: before the work, too, for whoever wants pictures of it."""
    if not can_draw():
        raise ConfigError("pictures need matplotlib: pip install 'qosora[plots]'")


def png(figure: Any) -> bytes:
    """Return a figure of matplotlib as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def picture(says: str, data: bytes) -> str:
    """Return a picture for a page, with what it says in words."""
    encoded = base64.b64encode(data).decode()
    return f'<figure><img alt="{html.escape(says)}" src="data:image/png;base64,{encoded}"></figure>'


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Return a table; what it holds is escaped."""
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    others = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )  # fmt: skip
    return f"<div><table><tr>{first}</tr>{others}</table></div>"


def page(heading: str, title: str, body: str, style: str = "") -> str:
    """Return an HTML file.

    Args:
        heading: At its top.
        title: Of the window, and below the heading.
        body: The rest, as HTML.
        style: More rules.
    """
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}{style}</style>'
        f"<h1>{html.escape(heading)}</h1><p>{title}</p>{body}</html>\n"
    )
