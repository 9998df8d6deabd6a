"""Reports: what a run was made with, pages that read without a server or a network."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import platform
import resource
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import threads
from .io import files
from .io.files import PathLike

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from .maps import HalfMapFsc, HalfMaps, ReferenceBias, Sharpened
    from .noise import Noise

__all__ = ["environment", "growth_figure", "map_summary", "peak_memory_gb", "write", "write_map"]

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
        "cores": threads.count(),
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


def map_summary(
    half_maps: HalfMaps,
    curves: HalfMapFsc,
    mask: np.ndarray,
    quaternions: np.ndarray,
    *,
    symmetry: str = "C1",
    test: ReferenceBias | None = None,
) -> dict[str, Any]:
    """The figures that a map is judged by, units in the names.

    Parameters
    ----------
    half_maps : HalfMaps
    curves : HalfMapFsc
    mask : (m, m, m) array
    quaternions : (n, 4) array, unit, xyzw
    symmetry : str
        Point group that the map was made in.
    test : ReferenceBias, optional
        Where a reference was used.

    Returns
    -------
    dict
    """
    from . import maps

    fine, coarse = curves.corrected.resolution(0.143), curves.corrected.resolution(0.5)
    spread = maps.coverage(quaternions, symmetry=symmetry)
    summary: dict[str, Any] = {
        "particles": len(quaternions),
        "box_px": half_maps.first.box_px,
        "voxel_size_angstrom": half_maps.first.voxel_size_angstrom,
        "half_maps": half_maps.wording,
        "resolution_fsc0143_angstrom": fine.angstrom,
        "resolution_fsc05_angstrom": coarse.angstrom,
        "nyquist_limited": fine.nyquist_limited,
        "nyquist_angstrom": 2 * half_maps.first.voxel_size_angstrom,
        "mask_fraction": float(mask.mean()),
        "phases_randomised_from_angstrom": 1 / curves.randomised_from,
        "coverage_evenness": spread.evenness,
        "coverage_unseen": spread.unseen,
        "coverage_anisotropy": spread.anisotropy,
        "coverage_uneven": spread.uneven,
    }
    if test is not None:
        summary["reference_used_to_angstrom"] = test.resolution_angstrom
        summary["correlation_beyond_reference"] = test.correlation
        summary["z_beyond_reference"] = test.z
        summary["believable"] = test.believable
    return summary


def write_map(
    path: PathLike,
    title: str,
    half_maps: HalfMaps,
    curves: HalfMapFsc,
    mask: np.ndarray,
    quaternions: np.ndarray,
    *,
    symmetry: str = "C1",
    test: ReferenceBias | None = None,
    noise: Noise | None = None,
    notes: Sequence[str] = (),
    growth: Sequence[tuple[float, np.ndarray]] = (),
    sharp: Sharpened | None = None,
) -> dict[str, Any]:
    """Write a page about a map: what it resolves, how that was judged, and what to doubt.

    Parameters
    ----------
    path : path
    title : str
    half_maps, curves, mask, quaternions, symmetry, test
        See :func:`map_summary`.
    noise : Noise, optional
        Of the images.
    notes : list of str
        Paragraphs that stand first.
    growth : list of (float, (m, m) array)
        How the map grew: resolutions, angstrom, and projections.
    sharp : Sharpened, optional
        The map sharpened.

    Returns
    -------
    dict
        The :func:`map_summary` that it shows, with the B factor of a sharpened map.
    """
    import matplotlib.pyplot as plt

    summary = map_summary(half_maps, curves, mask, quaternions, symmetry=symmetry, test=test)
    if sharp is not None:
        summary["b_factor_angstrom2"] = sharp.b_factor_angstrom2
    first: list[Any] = list(notes)
    if test is not None and not test.believable:
        first.append(
            f"WARNING: the half-maps do not agree beyond {test.resolution_angstrom:g} A, to which "
            f"the reference was used ({test.z:.1f} standard deviations of noise): this may be the "
            "reference alone, not a map of these images."
        )
    if summary["coverage_uneven"]:
        first.append(
            "WARNING: the particles were seen mostly from some directions (evenness "
            f"{summary['coverage_evenness']:.2f} of 1): the map is smeared along others, and its "
            "resolution is not one figure."
        )
    first.append(
        f"FSC between {half_maps.wording}, in a soft mask made from the map, corrected by phase "
        "randomisation (Chen et al. 2013)."
    )
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in summary.items()}
    first.append([["measured", "value"], *([k, v] for k, v in shown.items())])
    pages = _drawn(half_maps, curves, quaternions, sharp, noise, growth)
    sections: list[tuple[str, Sequence[Any]]] = [("Result", first)]
    sections += [(heading, [(figure, caption)]) for heading, figure, caption in pages]
    about = [["what", "value"], *([k, str(v)] for k, v in environment().items())]
    write(path, title, [*sections, ("Made with", [about])])
    for _, figure, _ in pages:
        plt.close(figure)
    return summary


def _drawn(
    half_maps: HalfMaps,
    curves: HalfMapFsc,
    quaternions: np.ndarray,
    sharp: Sharpened | None,
    noise: Noise | None,
    growth: Sequence[tuple[float, np.ndarray]],
) -> list[tuple[str, Figure, str]]:
    """Headings, figures and captions of what there is of a map."""
    finest = curves.corrected.resolution(0.143).angstrom
    lines, views, pictures = _map_figures(half_maps, curves, quaternions, finest)
    pages = [
        ("Fourier shell correlation", lines, "FSC of the half-maps."),
        ("Coverage", views, "Where the particles were seen from, relative to uniform."),
        ("Map", pictures, "Central slices."),
    ]
    if sharp is not None:
        caption = "Fall-off of the map beside a protein's that is blurred as much; and undone."
        pages.append(("Sharpened", _sharpening_figure(sharp), caption))
    if noise is not None:
        figure = _noise_figure(noise, half_maps.first.voxel_size_angstrom)
        pages.append(("Noise", figure, "Power of the images' noise."))
    if growth:
        caption = "The map of the best start, seen along z."
        pages.append(("How it grew", growth_figure(growth), caption))
    return pages


def _sharpening_figure(sharp: Sharpened) -> Figure:
    """The fit of the B factor, and slices of the map."""
    import matplotlib.pyplot as plt

    from . import plots

    figure, (ax, below) = plt.subplots(
        2, 1, figsize=(6, 5.4), layout="constrained", height_ratios=(3, 2.2)
    )
    squares = sharp.frequencies**2
    ax.plot(squares, sharp.logarithms, ".-", color=plots.COLOURS["estimated"], label="the map")
    ax.plot(squares, sharp.fitted, ":", color="0.3", label="a protein's, blurred as much")
    ax.set(xlabel="1/d² (1/Å²)", ylabel="log amplitude")
    ax.legend(frameon=False, fontsize=8, title=f"B = {sharp.b_factor_angstrom2:.0f} Å²")
    plots.slices(sharp.density, title="sharpened", ax=below)
    return figure


def _noise_figure(noise: Noise, pixel_size_angstrom: float) -> Figure:
    """The spectrum of each optics group."""
    import matplotlib.pyplot as plt

    from .plots import COLOURS

    figure, ax = plt.subplots(figsize=(6.5, 3.0), layout="constrained")
    seen = noise.frequencies <= 0.5
    for group, power in enumerate(noise.power):
        label = f"group {group + 1}" if len(noise.power) > 1 else None
        colour = COLOURS["estimated"] if group == 0 else None
        k = noise.frequencies[seen] / pixel_size_angstrom
        ax.plot(k, power[seen], label=label, color=colour)
    ax.set(xlabel="frequency (1 / angstrom)", ylabel="variance per pixel", ylim=(0, None))
    if len(noise.power) > 1:
        ax.legend()
    return figure


def growth_figure(growth: Sequence[tuple[float, np.ndarray]]) -> Figure:
    """Projections of a map as it grew."""
    import matplotlib.pyplot as plt

    columns = min(5, len(growth))
    rows = -(-len(growth) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.6 * columns, 1.8 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.ravel():
        ax.axis("off")
    for (resolution, seen), ax in zip(growth, axes.ravel(), strict=False):
        ax.imshow(seen, cmap="gray")
        ax.set_title(f"{resolution:.0f} Å", fontsize=9)
    return figure


def _map_figures(
    half_maps: HalfMaps, curves: HalfMapFsc, quaternions: np.ndarray, finest: float
) -> tuple[Figure, Figure, Figure]:
    """FSC, coverage, and slices of the maps, low-passed to ``finest``, angstrom."""
    import matplotlib.pyplot as plt

    from . import plots

    lines, ax = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    styles = {
        "unmasked": ("random", "-"),
        "masked": ("baseline", "-"),
        "randomised": ("baseline", ":"),
        "corrected": ("estimated", "-"),
    }
    for name, (colour, dashes) in styles.items():
        one = getattr(curves, name)
        ax.plot(
            one.frequencies, one.values, color=plots.COLOURS[colour], ls=dashes,
            label=f"{name}, {one.resolution(0.143).angstrom:.1f} Å",
        )  # fmt: skip
    for threshold in (0.5, 0.143):
        ax.axhline(threshold, color="0.7", lw=0.8, ls=":")
    ax.set(xlabel="spatial frequency (1/Å)", ylabel="FSC", ylim=(-0.15, 1.03), xlim=(0, None))
    ax.legend(frameon=False, fontsize=8, title="resolution at FSC 0.143", title_fontsize=8)
    views, ax = plt.subplots(
        figsize=(5.5, 3.2), subplot_kw={"projection": "mollweide"}, layout="constrained"
    )
    plots.coverage(quaternions, title="viewing directions", ax=ax)
    pictures, axes = plt.subplots(3, 1, figsize=(6, 6.6), layout="constrained")
    for one, name, ax in zip(
        (half_maps.first, half_maps.second, half_maps.mean),
        ("first half-map", "second half-map", "their mean"),
        axes,
        strict=True,
    ):
        plots.slices(one.low_passed(finest), title=f"{name}, low-passed to {finest:.1f} Å", ax=ax)
    return lines, views, pictures
