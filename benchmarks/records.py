"""How every benchmark leaves its figures: records, and the table in the README."""

import json
import time
from pathlib import Path

from cryoem import density, files, report, structures

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"


def volume_of(source, symmetry="C1", box_px=116):
    """The density of a shipped particle, of an atomic model, or of a map, in one box."""
    if str(source).endswith((".mrc", ".map", ".mrc.gz", ".map.gz")):
        return density.read_mrc(source).in_box(box_px)
    return structures.load_density(str(source), symmetry=symmetry, box_px=box_px)


def write(name, records, header, rows, command):
    """Write ``results/NAME.json`` (a list of records) and ``results/NAME.md`` (the table).

    Where the README has the markers ``<!-- NAME -->`` and ``<!-- /NAME -->``, the table replaces
    what stands between them.

    Parameters
    ----------
    name : str
    records : list of dict
        Units in the keys; environment and date are added to those that do not have them yet.
    header : list of str
    rows : list of lists of str
    command : str
        What makes them again.
    """
    common = {"command": command, "date": time.strftime("%Y-%m-%d"), **report.environment()}
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    versions = ", ".join(f"{k} {v}" for k, v in common["versions"].items())
    lines += ["", f"`{command}`, {common['cores']} cores; {versions}."]
    with files.atomic(RESULTS / f"{name}.json") as path:
        path.write_text(json.dumps([{**common, **r} for r in records], indent=1) + "\n")
    with files.atomic(RESULTS / f"{name}.md") as path:
        path.write_text("\n".join(lines) + "\n")
    before, start, rest = README.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if start and end:
        with files.atomic(README) as path:
            path.write_text(before + start + "\n".join(lines) + "\n" + end + after)
