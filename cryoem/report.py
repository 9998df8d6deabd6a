"""Reports: what a run was made with, and a page that reads without a server or a network."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import os
import platform
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import files
from .files import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["environment", "peak_memory_gb", "write"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #555; font-size: .9rem }
"""


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, GB."""
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def environment() -> dict[str, Any]:
    """Versions and machine, for records of what was measured."""
    names = (
        "cryoem",
        "numpy",
        "scipy",
        "finufft",
        "gemmi",
        "keras",
        "tensorflow-cpu",
        "tensorflow",
    )
    installed = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "versions": {name: importlib.metadata.version(name) for name in names if name in installed},
    }


def _picture(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _table(rows: Sequence[Sequence[object]]) -> str:
    header, *body = rows
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in body
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def write(path: PathLike, title: str, sections: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Write an HTML page with its pictures inside, atomically.

    Parameters
    ----------
    path : path
    title : str
    sections : list of (heading, list of parts)
        A part is a paragraph (str), a table (list of rows, the first its header), or a picture with
        its caption (matplotlib figure, str).
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        for part in parts:
            if isinstance(part, str):
                body.append(f"<p>{html.escape(part)}</p>")
            elif isinstance(part, list):
                body.append(_table(part))
            else:
                figure, caption = part
                caption = html.escape(caption)
                body.append(
                    f'<figure><img alt="{caption}" src="data:image/png;base64,{_picture(figure)}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    with files.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
