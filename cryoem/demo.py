"""The whole method on a real protein that ships with the project: ``make demo``.

Both roads to the orientations of the same images: by the shipped network, which knows the protein
(distances, orientations, refinement, map), and from the images alone. Every figure is printed, and
kept in ``summary.json`` and ``report.html``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import distances, evaluation, imaging, maps, report, rotations
from .abinitio import AbInitio, ab_initio
from .density import Density, write_density
from .io import files
from .io.files import PathLike
from .io.particles import write_particles
from .maps import Fsc
from .matching import MatchedStack, match
from .particles import ParticleStack
from .reconstruction import reconstruct
from .recovery import OrientedStack, orient
from .refinement import HalvesRefinement, refine_halves
from .report import peak_memory_gb
from .simulation import simulate
from .structures import SHIPPED, load_density

if TYPE_CHECKING:
    from .estimator import Estimator

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
        from . import estimator as _  # noqa: F401
    with stages(f"density of {particle.upper()}, {SHIPPED[particle].title}"):
        reference = load_density(particle)
    with stages(f"{n_images} unseen images at SNR {_ratio(snr)}"):
        seen = simulate(reference, n_images, [seed, 2021], snr=snr)
    found = _oriented(stages, particle, seen, reference, seed)
    final = _final_map(stages, seen, found, reference)
    summary = {
        "particle": particle,
        "n_images": n_images,
        "snr": snr if math.isfinite(snr) else "inf",
        "box_px": reference.box_px,
        "voxel_size_angstrom": reference.voxel_size_angstrom,
        **_figures(stages, particle, found, seen, reference, seed),
        **_map_figures(final),
        "stages": stages.rows,
        "seed": seed,
        **report.environment(),
    }
    with stages("writing the results"):
        _write(output, summary, found, final, seen, reference)
    summary["seconds_total"] = round(stages.seconds(), 1)
    summary["peak_memory_gb"] = round(peak_memory_gb(), 2)
    with files.atomic(output / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


@dataclass(frozen=True)
class _Found:
    """Orientations, the way they were found, and the distances behind them."""

    estimator: Estimator
    distances: np.ndarray
    true_distances: np.ndarray
    free: OrientedStack
    refined: HalvesRefinement
    placed: OrientedStack
    matched: MatchedStack
    matching_seconds: float
    alone: AbInitio
    alone_refined: HalvesRefinement


@dataclass(frozen=True)
class _Map:
    """The map at the refined poses, laid onto the density, and how well the two agree."""

    particles: ParticleStack
    recovered: Density
    registered: Density
    curves: dict[str, Fsc]


def _oriented(
    stages: Stages, particle: str, seen: ParticleStack, reference: Density, seed: int
) -> _Found:
    """Orientations of the images: free, refined, against references, and by the baseline."""
    from .estimator import load_estimator

    unknown = seen.without_poses()
    pairs = distances.sample_pairs(len(seen), 100_000, seed)
    with stages("distances of all images, by the shipped network"):
        estimator = load_estimator(particle)
        features = estimator.embed(seen.images[:])
        estimated = estimator.distances(features, features)[pairs[:, 0], pairs[:, 1]]
    with stages("orientations from the distances, frame from copies (no truth, no density)"):
        free = orient(estimator, unknown, seed=seed)
    assert free.frame is not None  # the copies fixed it
    with stages("refinement and reconstruction in turns (no truth, no density)"):
        small = free.with_images(imaging.crop(seen.images[:], REFINED_PX))
        refined = refine_halves(small, rounds=3, seed=seed, progress=True)
    with stages("orientations against references (the density's own frame)"):
        placed = orient(estimator, unknown, reference=reference, seed=seed)
    with stages("baseline: projection matching, 21,600 references"):
        matched = match(unknown, reference, estimator.preprocessing, progress=True)
    true = rotations.pair_distances(seen.oriented(), pairs)
    seconds = stages.rows[-1]["seconds"]
    with stages("the other road: from the images alone (no network, no truth, no density)"):
        alone = ab_initio(unknown.replace(noise=None), seed=seed, progress=True)
        print(f"         {alone.verdict}")
    with stages("and refined, half against half"):
        cut = alone.particles.with_images(imaging.crop(seen.images[:], REFINED_PX))
        further = refine_halves(
            cut, symmetry=alone.axes.symmetry, rounds=3, seed=seed, progress=True
        )
    return _Found(
        estimator, estimated, true, free, refined, placed, matched, seconds, alone, further
    )


def _final_map(stages: Stages, seen: ParticleStack, found: _Found, reference: Density) -> _Map:
    # The references say how the free orientations lie in the density's frame, and which hand.
    refined = found.refined.particles
    laid = evaluation.align(refined.quaternions, found.placed.quaternions, over="one-sided")
    final = refined.with_images(seen.images[:]).with_poses(laid.quaternions)
    with stages("map at the refined orientations"):
        recovered = reconstruct(final.replace(contrast=None), progress=True)
    with stages("map at the true orientations, for comparison"):
        ideal = reconstruct(seen, progress=True)
    with stages("registration and Fourier shell correlation"):
        registered = maps.register(recovered, reference, allow_mirror=False)
        curves = {
            "true orientations": maps.fsc(ideal, reference),
            "refined orientations": maps.fsc(registered.density, reference),
        }
    return _Map(final, recovered, registered.density, curves)


def _figures(
    stages: Stages,
    particle: str,
    found: _Found,
    seen: ParticleStack,
    reference: Density,
    seed: int,
) -> dict[str, Any]:
    """Figures of distances and orientations, against the truth and the physical limit."""
    truth, estimator = seen.oriented(), found.estimator
    refined, frame = found.refined.particles, found.free.frame
    assert frame is not None
    with stages("physical limit (Cramer-Rao) of the first 200 images"):
        bound = 0.0
        if seen.noise is not None:
            covariance = evaluation.cramer_rao(reference, truth[:200], seen.noise.variance)
            bound = float(evaluation.mean_error_of(covariance).mean())

    def error(stack: ParticleStack, over: Literal["o4", "one-sided", "none"]) -> float:
        return evaluation.orientation_errors(stack.oriented(), truth, over=over).mean_rad

    one_sided = evaluation.orientation_errors(found.free.quaternions, truth)
    return {
        "weights": {
            "file": f"data/{particle}.npz",
            "images_seen": estimator.notes["images"],
        },
        "distance_mae_rad": distances.compare(found.distances, found.true_distances).mae_rad,
        "e_or_rad": error(found.free, "o4"),
        "one_sided_error_rad": one_sided.mean_rad,
        "one_sided": asdict(one_sided),
        "refined_error_rad": error(refined, "one-sided"),
        "expected_error_rad": float(refined.expected_error_rad.mean()),
        "half_map_resolution_fsc0143_angstrom": found.refined.fsc.corrected.resolution(
            0.143
        ).angstrom,
        "unaligned_error_rad": error(found.placed, "none"),
        "images_alone_verdict": str(found.alone.verdict),
        "images_alone_symmetry": found.alone.axes.symmetry,
        "images_alone_error_rad": error(found.alone.particles, "one-sided"),
        "images_alone_refined_error_rad": error(found.alone_refined.particles, "one-sided"),
        "random_one_sided_error_rad": evaluation.random_error(truth, seed),
        "projection_matching_error_rad": error(found.matched, "none"),
        "projection_matching_seconds": found.matching_seconds,
        "bound_mean_rad": bound,
        "frame_certain": bool(frame.certain),
        "frame_spread_rad": frame.spread_rad,
    }


def _map_figures(final: _Map) -> dict[str, Any]:
    here, ideal = (final.curves[f"{name} orientations"] for name in ("refined", "true"))
    at = here.resolution(0.5)
    return {
        "resolution_fsc05_angstrom": at.angstrom,
        "resolution_fsc05_nyquist_limited": at.nyquist_limited,
        "resolution_fsc05_true_orientations_angstrom": ideal.resolution(0.5).angstrom,
        "mean_fsc": here.mean,
        "mean_fsc_true_orientations": ideal.mean,
    }


def _write(
    output: Path,
    summary: dict[str, Any],
    found: _Found,
    final: _Map,
    seen: ParticleStack,
    reference: Density,
) -> None:
    """Maps, particles and the report."""
    write_density(output / "map.mrc", final.recovered)
    finest = summary["resolution_fsc05_angstrom"]
    write_density(output / "map_filtered.mrc", final.recovered.low_passed(finest))
    write_particles(output / "oriented.star", final.particles)
    truth = seen.oriented()
    angles = [
        rotations.distance(
            evaluation.align(stack.quaternions, truth, over="one-sided").quaternions, truth
        )
        for stack in (found.free, found.refined.particles, found.alone_refined.particles)
    ]
    sections = _sections(summary, seen, reference, final, found, angles)
    title = f"{summary['particle'].upper()} at SNR {_ratio(float(summary['snr']))}"
    report.write(output / "report.html", f"{title}: orientations from the images", sections)


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
        ["from the images alone: no network, no density", *angle("images_alone_error_rad")],
        ["the same after refinement", *angle("images_alone_refined_error_rad")],
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
    seen: ParticleStack,
    reference: Density,
    final: _Map,
    found: _Found,
    angles: list[np.ndarray],
) -> list[tuple[str, list[Any]]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from . import plots

    voxel = reference.voxel_size_angstrom
    learned = plots.predicted_against_true(found.distances, found.true_distances).figure
    quality, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    names = ("by the network", "refined", "from the images alone, refined")
    for ax, angle, name in zip(panels, angles, names, strict=False):
        plots.error_histogram(angle, ax=ax)
        ax.set_title(f"{name}", fontsize="medium")
    plots.fsc(final.curves, ax=panels[-1])
    crop = reference.box_px // 2
    both, (top, bottom) = plt.subplots(2, 1, figsize=(6, 4.6), layout="constrained")
    plots.slices(reference.in_box(crop), title="density of the atomic model", ax=top)
    finest = summary["resolution_fsc05_angstrom"]
    shown = final.registered.low_passed(finest).in_box(crop)
    plots.slices(shown, title=f"map, low-passed to {finest:.0f} Å, registered", ax=bottom)
    some = plots.images(seen.images[:6], pixel_size_angstrom=voxel).figure
    where = plots.coverage(seen.oriented(), title="true viewing directions").figure
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
                 "hand: of the first road, as recovered and as refined, and of the second; Fourier "
                 "shell correlation of the first's map with the density, no mask."),
                (both, "Central slices, first road."),
            ],
        ),
        (
            "From the images alone",
            [
                "The second road knows neither network nor density: random orientations, each half "
                f"of the images by itself. Its verdict: {summary['images_alone_verdict']}.",
                (report.growth_figure(found.alone.history), "The map of the best start as it "
                 "grew, seen along z."),
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
