"""The whole method on a real protein that ships with the project: ``make demo``.

Atomic model, density, projections, distances, orientations, refinement, map; every figure is
printed, and kept in ``summary.json`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import environment, peak_memory_gb

if TYPE_CHECKING:
    import numpy as np

    from .density import Density
    from .files import PathLike
    from .maps import Fsc
    from .simulation import Particles

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__all__ = ["main", "run"]

#: Edge of the images that are refined: the shipped particles and their shifts, and little else.
REFINED_PX = 64


class Stages:
    """Says what is going on, and keeps time and memory of each stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        """Run a stage."""
        print(f"[{time.perf_counter() - self.start:4.0f} s] {title}", flush=True)
        start = time.perf_counter()
        yield
        self.rows.append(
            {
                "stage": title,
                "seconds": round(time.perf_counter() - start, 2),
                "peak_memory_gb": round(peak_memory_gb(), 2),
            }
        )

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start


def run(
    output: PathLike,
    *,
    particle: str = "4jsv",
    n_images: int = 1000,
    snr: float = 1 / 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the demo.

    Parameters
    ----------
    output : path
        Folder for ``summary.json``, ``map.mrc`` (and it low-passed), ``oriented.star`` with its
        stack, ``report.html``.
    particle : str
        A shipped particle with shipped weights.
    n_images : int
    snr : float
        Of the full frame; infinity for clean images.
    seed : int

    Returns
    -------
    dict
        The contents of ``summary.json``.
    """
    stages = Stages()
    output = Path(output)
    with stages("importing TensorFlow"):
        from . import estimator as estimators
    from . import (
        density,
        distances,
        evaluation,
        files,
        imaging,
        maps,
        matching,
        orient,
        reconstruction,
        refinement,
        report,
        rotations,
        simulation,
        star,
        structures,
    )

    with stages(f"density of {particle.upper()}, {structures.SHIPPED[particle].title}"):
        reference = structures.load_density(particle)
    voxel = reference.voxel_size_angstrom
    with stages(f"{n_images} unseen images at SNR {_ratio(snr)}"):
        seen = simulation.particles(reference, n_images, [seed, 2021], snr=snr)
    truth = seen.quaternions
    pairs = distances.sample_pairs(n_images, 100_000, seed)
    true_distances = rotations.pair_distances(truth, pairs)

    with stages("distances of all images, by the shipped network"):
        model = estimators.shipped(particle)
        features = model.embed(seen.images)
        found = model.distances(features, features)[pairs[:, 0], pairs[:, 1]]
        errors = distances.compare(found, true_distances)
    with stages("orientations from the distances, frame from copies (no truth, no density)"):
        free = orient.orient(model, seen.images, seed=seed)
    assert free.frame is not None  # the copies fixed it
    with stages("refinement and reconstruction in turns (no truth, no density)"):
        refined = refinement.alternate(
            imaging.crop(seen.images, REFINED_PX),
            free.quaternions,
            voxel_size_angstrom=voxel,
            shifts_px=free.shifts_px,
            rounds=3,
            seed=seed,
            progress=True,
        )
    with stages("orientations against references (the density's own frame)"):
        placed = orient.orient_by_references(model, seen.images, reference)
    with stages("baseline: projection matching, 21,600 references"):
        matched = matching.match(seen.images, reference, model.preprocessing, progress=True)
    baseline_seconds = stages.rows[-1]["seconds"]
    with stages("physical limit (Cramer-Rao) of the first 200 images"):
        bound = 0.0
        if seen.noise_variance:
            covariance = evaluation.cramer_rao(reference, truth[:200], seen.noise_variance)
            bound = float(evaluation.mean_error_of(covariance).mean())
    # The references say how the free orientations lie in the density's frame, and which hand.
    laid = evaluation.align(refined.refined.quaternions, placed.quaternions, over="one-sided")
    final = laid.quaternions
    with stages("map at the refined orientations"):
        recovered = reconstruction.reconstruct(
            seen.images,
            final,
            voxel_size_angstrom=voxel,
            shifts_px=refined.refined.shifts_px,
            progress=True,
        )
    with stages("map at the true orientations, for comparison"):
        ideal = reconstruction.reconstruct(
            seen.images, truth, voxel_size_angstrom=voxel, progress=True
        )
    with stages("registration and Fourier shell correlation"):
        registered = maps.register(recovered, reference, allow_mirror=False)
        curves = {
            "true orientations": maps.fsc(ideal, reference),
            "refined orientations": maps.fsc(registered.density, reference),
        }
    at = {name: one.resolution(0.5) for name, one in curves.items()}
    one_sided = evaluation.errors(free.quaternions, truth)
    summary = {
        "particle": particle,
        "n_images": n_images,
        "snr": snr if math.isfinite(snr) else "inf",
        "box_px": reference.box_px,
        "voxel_size_angstrom": voxel,
        "weights": {"file": f"data/{particle}.npz", "images_seen": model.notes["images"]},
        "distance_mae_rad": errors.mae_rad,
        "e_or_rad": evaluation.errors(free.quaternions, truth, over="o4").mean_rad,
        "one_sided_error_rad": one_sided.mean_rad,
        "one_sided": asdict(one_sided),
        "refined_error_rad": evaluation.errors(refined.refined.quaternions, truth).mean_rad,
        "expected_error_rad": float(refined.refined.expected_error_rad.mean()),
        "half_map_resolution_fsc0143_angstrom": refined.fsc.corrected.resolution(0.143).angstrom,
        "unaligned_error_rad": evaluation.errors(placed.quaternions, truth, over="none").mean_rad,
        "random_one_sided_error_rad": evaluation.random_error(truth, seed),
        "projection_matching_error_rad": evaluation.errors(
            matched.quaternions, truth, over="none"
        ).mean_rad,
        "projection_matching_seconds": baseline_seconds,
        "bound_mean_rad": bound,
        "frame_certain": bool(free.frame.certain),
        "frame_spread_rad": free.frame.spread_rad,
        "resolution_fsc05_angstrom": at["refined orientations"].angstrom,
        "resolution_fsc05_nyquist_limited": at["refined orientations"].nyquist_limited,
        "resolution_fsc05_true_orientations_angstrom": at["true orientations"].angstrom,
        "mean_fsc": curves["refined orientations"].mean,
        "mean_fsc_true_orientations": curves["true orientations"].mean,
        "stages": stages.rows,
        "seed": seed,
        **environment(),
    }
    with stages("writing the results"):
        density.write_mrc(output / "map.mrc", recovered)
        finest = summary["resolution_fsc05_angstrom"]
        density.write_mrc(output / "map_filtered.mrc", recovered.low_passed(finest))
        star.write_particles(
            output / "oriented.star",
            seen.images,
            final,
            pixel_size_angstrom=voxel,
            shifts_px=refined.refined.shifts_px,
            columns={
                **free.columns,
                "cryoemExpectedErrorRad": refined.refined.expected_error_rad,
                "rlnRandomSubset": refined.subset,
            },
        )
        angles = [
            rotations.distance(evaluation.align(q, truth, over="one-sided").quaternions, truth)
            for q in (free.quaternions, refined.refined.quaternions)
        ]
        sections = _sections(
            summary, seen, reference, registered.density, found, true_distances, angles, curves
        )
        title = f"{particle.upper()} at SNR {_ratio(snr)}: orientations from the images"
        report.write(output / "report.html", title, sections)
    summary["seconds_total"] = round(stages.seconds(), 1)
    summary["peak_memory_gb"] = round(peak_memory_gb(), 2)
    with files.atomic(output / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _ratio(snr: float) -> str:
    if math.isinf(snr):
        return "infinite"
    return f"1/{1 / snr:g}" if snr < 1 else f"{snr:g}"


def _rows(summary: dict[str, Any]) -> list[list[str]]:
    """The short table: what, value, unit."""
    s = summary

    def angle(key: str) -> tuple[str, str]:
        return f"{s[key]:.3f} rad", f"{math.degrees(s[key]):.1f} degrees"

    limited = " (Nyquist)" if s["resolution_fsc05_nyquist_limited"] else ""
    return [
        ["measured", "value", ""],
        ["distance error, mean absolute", *angle("distance_mae_rad")],
        ["orientation error over O(4), the paper's E_OR", *angle("e_or_rad")],
        ["orientation error, frame fixed without the truth", *angle("one_sided_error_rad")],
        ["the same after refinement against the images' own map", *angle("refined_error_rad")],
        ["orientation error against references, nothing fitted", *angle("unaligned_error_rad")],
        ["the same of projection matching", *angle("projection_matching_error_rad")],
        ["frame, verdict on inversion", "certain" if s["frame_certain"] else "UNCERTAIN", ""],
        ["random orientations", *angle("random_one_sided_error_rad")],
        ["physical limit (Cramer-Rao)", *angle("bound_mean_rad")],
        [
            "map, FSC 0.5 against the density",
            f"{s['resolution_fsc05_angstrom']:.1f} A{limited}",
            f"{s['resolution_fsc05_true_orientations_angstrom']:.1f} A at the true orientations",
        ],
    ]


def _stage_rows(summary: dict[str, Any]) -> list[list[Any]]:
    header = ["stage", "seconds", "peak memory so far (GB)"]
    return [header, *([r["stage"], r["seconds"], r["peak_memory_gb"]] for r in summary["stages"])]


def _sections(
    summary: dict[str, Any],
    seen: Particles,
    reference: Density,
    registered: Density,
    found: np.ndarray,
    true: np.ndarray,
    angles: list[np.ndarray],
    curves: dict[str, Fsc],
) -> list[tuple[str, list[Any]]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from . import plots

    voxel = reference.voxel_size_angstrom
    learned = plots.predicted_against_true(found, true).figure
    quality, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    plots.error_histogram(angles[0], ax=left)
    plots.error_histogram(angles[1], ax=middle)
    plots.fsc(curves, ax=right)
    crop = reference.box_px // 2
    both, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4.6), layout="constrained")
    plots.slices(reference.in_box(crop), title="density of the atomic model", ax=top)
    finest = summary["resolution_fsc05_angstrom"]
    shown = registered.low_passed(finest).in_box(crop)
    plots.slices(shown, title=f"map, low-passed to {finest:.0f} Å, registered", ax=bottom)
    some = plots.images(seen.images[:6], pixel_size_angstrom=voxel).figure
    where = plots.coverage(seen.quaternions, title="true viewing directions").figure
    return [
        (
            "Result",
            [
                f"{summary['n_images']} simulated images of {summary['particle'].upper()}, "
                f"{summary['box_px']} px of {voxel} A, white noise at SNR "
                f"{_ratio(float(summary['snr']))} of the whole frame, seed {summary['seed']}. "
                "The network was trained on projections of the same density; these images it had "
                "not seen. The frame was fixed from turned and mirrored copies of the images; how "
                "it lies in the density's, and its hand, were then taken from reference "
                "projections. Refinement saw the images' own half-maps alone. The truth was used "
                "for the errors alone.",
                _rows(summary),
            ],
        ),
        ("Images", [(some, "Six of the images, one grey scale."), (where, "Coverage.")]),
        (
            "Distances",
            [(learned, "Estimated against true distances of 100,000 pairs.")],
        ),
        (
            "Orientations and map",
            [
                (quality, "Orientation errors after fitting a rotation of the density and its "
                 "hand, as recovered and as refined; Fourier shell correlation with the density, "
                 "no mask."),
                (both, "Central slices."),
            ],
        ),
        ("Time and memory", [_stage_rows(summary)]),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="results/demo", help="folder for the results")
    parser.add_argument("--images", type=int, default=1000, help="how many to orient")
    parser.add_argument("--snr", type=float, default=1 / 16, help="of the full frame; inf for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    summary = run(
        options.output,
        n_images=options.images,
        snr=options.snr,
        seed=options.seed,
    )
    print()
    for rows in (_stage_rows(summary), _rows(summary)):
        width = max(len(str(row[0])) for row in rows) + 2
        for row in rows:
            print(str(row[0]).ljust(width) + "  ".join(str(cell).ljust(12) for cell in row[1:]))
        print()
    print(
        f"{summary['seconds_total']:.0f} s in all, {summary['peak_memory_gb']:.1f} GB at most. "
        f"See {options.output}/report.html"
    )


if __name__ == "__main__":
    main()
