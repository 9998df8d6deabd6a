"""Writes API.md, the page of public names, from the package itself: ``make api``."""

import importlib
import inspect
from pathlib import Path

import cryoem

PAGE = Path(__file__).parent.parent / "API.md"


def signature(name: str) -> str:
    """The name with its parameters, without types; of a class the name alone."""
    value = getattr(importlib.import_module(f"cryoem.{cryoem.PUBLIC[name][0]}"), name)
    if inspect.isclass(value):
        return name
    parts, starred = [], False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        known = parameter.default is parameter.empty
        parts.append(parameter.name if known else f"{parameter.name}=")
    return f"{name}({', '.join(parts)})"


def page() -> str:
    """The page's text."""
    lines = [
        "# Public names",
        "",
        "`from cryoem import NAME`; each is loaded when it is first used. Docstrings have shapes,",
        "units and errors. Made from `cryoem.PUBLIC` by `make api`.",
        "",
        "| name | what | defined in |",
        "| --- | --- | --- |",
    ]
    for name, (module, what) in cryoem.PUBLIC.items():
        lines.append(f"| `{signature(name)}` | {what} | `cryoem.{module}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
