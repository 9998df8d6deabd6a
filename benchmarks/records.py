"""How every benchmark leaves its figures: records, and the tables that are made of them.

The tables stand in README.md beside this file, some rows in the project's README;
``python benchmarks/records.py`` writes those rows anew.
"""

import json
import subprocess
import time
from pathlib import Path

import numpy as np

from cryoem import evaluation, load_density, read_density, report
from cryoem.io import files

RESULTS = Path(__file__).parent / "results"
TABLES = Path(__file__).parent / "README.md"
README = Path(__file__).parent.parent / "README.md"


def volume_of(source, symmetry="C1", box_px=116):
    """The density of a shipped particle, of an atomic model, or of a map, in one box."""
    if str(source).endswith((".mrc", ".map", ".mrc.gz", ".map.gz")):
        return read_density(source).in_box(box_px)
    return load_density(str(source), symmetry=symmetry, box_px=box_px)


def limit(density, stack):
    """Mean error that the noise allows, shifts being unknown, from 200 of the particles."""
    some = stack.select(slice(0, 200))
    covariance = evaluation.cramer_rao(
        density, some.quaternions, some.noise, ctf=some.ctf(), shifts=True
    )
    return float(evaluation.mean_error_of(covariance[:, :3, :3]).mean())


def likelier(found, other):
    """Orientations of the same images refined twice: of each image the likelier one."""
    better = other.gain * other.noise_variance > found.gain * found.noise_variance
    return np.where(better[:, None], other.quaternions, found.quaternions)


def kept(path, make):
    """What ``make()`` gave, now or in an interrupted run: a record, or a list of them."""
    if not path.exists():
        made = make()
        print(made, flush=True)
        with files.atomic(path) as temporary:
            temporary.write_text(json.dumps(made))
    return json.loads(path.read_text())


def commit():
    """The version of the code, for records of many runs; + where files differ from it."""
    code = ["git", "-C", str(TABLES.parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(code, capture_output=True, text=True, check=False).stdout.strip()


def write(name, records, header, rows, command):
    """Write ``results/NAME.json`` (a list of records) and ``results/NAME.md`` (the table).

    In ``benchmarks/README.md`` the table replaces what stands between the markers
    ``<!-- NAME -->`` and ``<!-- /NAME -->``.

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
    _put(TABLES, name, lines)
    summarise()


def _put(path, name, lines):
    """Replace what stands between the markers of ``name``."""
    before, start, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if start and end:
        with files.atomic(path) as temporary:
            temporary.write_text(before + start + "\n".join(lines) + "\n" + end + after)


#: The rows of the project's README: what, the benchmark, which record, and what it says.
SUMMARY = [
    (
        "orientations of unseen images of 4JSV, noiseless",
        "accuracy",
        {"particle": "4jsv", "model": "4jsv", "snr": "inf", "condition": "plain"},
        "{one_sided_error_rad:.3f} rad",
        "a rotation and the hand fitted; the network was trained on projections of 4JSV",
    ),
    (
        "the same at SNR 1/16, with CTF",
        "accuracy",
        {"particle": "4jsv", "model": "4jsv", "snr": 1 / 16, "condition": "ctf"},
        "{one_sided_error_rad:.3f} rad",
        "the physical limit is {bound_mean_rad:.3f} rad; random orientations are "
        "{random_one_sided_error_rad:.1f} rad off",
    ),
    (
        "the paper's 5j0n at SNR 1/16",
        "accuracy",
        {"particle": "5j0n", "model": "5j0n", "snr": 1 / 16, "condition": "plain"},
        "{one_sided_error_rad:.3f} rad",
        "the paper has {paper_rad:.2f} rad, its whole O(4) fitted",
    ),
    (
        "refined against the density, 4JSV at SNR 1/16",
        "refinement",
        {"particle": "4jsv", "case": "known density", "snr": "SNR 1/16"},
        "{error_rad:.3f} rad",
        "from {start_error_rad:.1f} rad off; the limit is {bound_rad:.3f} rad",
    ),
    (
        "refined half against half, no density",
        "refinement",
        {"particle": "4jsv", "case": "density reconstructed"},
        "{error_rad:.3f} rad",
        "half-maps agree to {half_map_resolution_angstrom:.1f} A",
    ),
    (
        "100,000 images of 4JSV (128 px) at SNR 1/16, with CTF, oriented from the images alone",
        "large",
        {"particle": "4jsv", "step": "from the file to poses"},
        "{wall_minutes:.0f} min",
        "a network that learned from their own map is {network_error_rad:.3f} rad off (median "
        "{network_median_rad:.3f}); {threads} cores, {peak_memory_gb:.1f} GB",
    ),
    (
        "the same, refined half against half",
        "large",
        {"particle": "4jsv", "step": "refinement of all"},
        "{error_rad:.3f} rad",
        "the limit is {bound_mean_rad:.3f} rad; half-maps agree to "
        "{half_map_resolution_angstrom:.1f} A; {peak_memory_gb:.1f} GB",
    ),
    *(
        (
            what,
            "peers_refinement",
            {"particle": "4jsv", "method": method},
            "{error_rad:.3f} rad",
            "median {median_rad:.3f}, the limit is {bound_mean_rad:.3f} rad; half-maps agree to "
            "{half_map_resolution_angstrom:.1f} A; {cpu_seconds:,.0f} s of processor",
        )
        for what, method in (
            (
                "300 images of 4JSV (64 px) at SNR 1/16, with CTF, from a map at 40 A: `solve "
                "--reference`",
                "cryoem",
            ),
            ("the same by RELION's auto-refine", "RELION 3.1.3"),
        )
    ),
    (
        "1,633 real particles of beta-galactosidase (EMPIAR-10204), from the images alone",
        "real",
        {"case": "all, 128 px"},
        "{refined_half_map_resolution_angstrom:.1f} A",
        "all that pixels of 2.5 A hold; the map is like the protein's atomic model (FSC 0.5) to "
        "{model_fsc05_angstrom:.1f} A; at poses of RELION's 3D classification, on a grid of 7.5 "
        "degrees, to {relion_model_fsc05_angstrom:.1f} A",
    ),
]


def summarise():
    """Write the rows of the project's README."""
    lines = ["| what | measured | beside it |", "| --- | --- | --- |"]
    for what, name, wanted, measured, beside in SUMMARY:
        found = json.loads((RESULTS / f"{name}.json").read_text())
        record = next((r for r in found if all(r.get(k) == v for k, v in wanted.items())), None)
        if record is not None:
            lines.append(f"| {what} | {measured.format(**record)} | {beside.format(**record)} |")
    _put(README, "measured", lines)


if __name__ == "__main__":
    summarise()
