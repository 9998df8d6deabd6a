"""Pictures: each draws on the ``ax`` it is given, or makes one, and returns it.

The same colour means the same thing everywhere: what is true, what is estimated, the baseline, and
what chance gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from . import rotations

if TYPE_CHECKING:
    import ipyvolume
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D

    from .density import Density
    from .maps import Fsc

__all__ = [
    "COLOURS",
    "coverage",
    "curve",
    "density3d",
    "distance_histogram",
    "error_histogram",
    "fsc",
    "images",
    "isosurface3d",
    "orientations3d",
    "predicted_against_true",
    "slices",
]

COLOURS = {"true": "#1b1b1b", "estimated": "#0072b2", "baseline": "#d55e00", "random": "#999999"}


def _axes(ax: Axes | None, **options: Any) -> Axes:
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(layout="constrained", **options)
    return ax


def _outline(width: float) -> list[Any]:
    """A dark rim that keeps white marks readable on any image."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=width, foreground="black")]


def _montage(tiles: np.ndarray, columns: int) -> np.ndarray:
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:]
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, tile in enumerate(tiles):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def images(
    stack: ArrayLike,
    *,
    columns: int = 6,
    pixel_size_angstrom: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Show images side by side, on one grey scale.

    Parameters
    ----------
    stack : (n, size, size) array
    columns : int
    pixel_size_angstrom : float, optional
        Adds a scale bar of about a third of an image.
    title : str, optional
    ax : matplotlib.axes.Axes, optional
    """
    stack = np.asarray(stack)
    columns = min(columns, len(stack))
    rows = -(-len(stack) // columns)
    ax = _axes(ax, figsize=(1.6 * columns, 1.6 * rows + 0.3))
    low, high = np.percentile(stack, [0.5, 99.8])
    ax.imshow(_montage(stack, columns), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
    if pixel_size_angstrom:
        size = stack.shape[1]
        length = max(10, round(size * pixel_size_angstrom / 3 / 50) * 50)
        y, x = size * 0.93, size * 0.06
        ax.plot(
            [x, x + length / pixel_size_angstrom],
            [y, y],
            color="white",
            lw=2.5,
            path_effects=_outline(4.5),
        )
        ax.text(
            x,
            y - size * 0.04,
            f"{length} Å",
            color="white",
            fontsize=8,
            va="bottom",
            path_effects=_outline(2),
        )
    ax.set_axis_off()
    if title:
        ax.set_title(title)
    return ax


def slices(density: Density, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Central slices of a density: xy, xz and yz."""
    v = density.values
    z, y, x = (n // 2 for n in v.shape)
    ax = images(
        np.stack([v[z], v[:, y], v[:, :, x]]),
        columns=3,
        pixel_size_angstrom=density.voxel_size_angstrom,
        title=title,
        ax=ax,
    )
    for i, name in enumerate(("xy", "xz", "yz")):
        ax.text(
            (i + 0.5) / 3, -0.02, name, transform=ax.transAxes, ha="center", va="top", fontsize=9
        )
    return ax


def coverage(
    quaternions: ArrayLike,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    bins: tuple[int, int] | None = None,
) -> Axes:
    """Viewing directions on a Mollweide map, relative to uniform.

    Parameters
    ----------
    quaternions : (n, 4) array
    bins : (rows, columns), optional
        Rows are equal in the cosine of the tilt, so that all cells have one area. Default: about
        eight views a cell where they are uniform, 24 rows at most.
    ax : Axes with the Mollweide projection, optional
    """
    ax = _axes(ax, figsize=(5.5, 3.2), subplot_kw={"projection": "mollweide"})
    direction = rotations.view_directions(quaternions)
    longitude = np.arctan2(direction[:, 1], direction[:, 0])
    if bins is None:
        rows = int(np.clip(np.sqrt(len(direction) / 16), 4, 24))
        bins = rows, 2 * rows
    rows, columns = bins
    sine = np.linspace(-1, 1, rows + 1)
    east = np.linspace(-np.pi, np.pi, columns + 1)
    counts, _, _ = np.histogram2d(direction[:, 2], longitude, bins=[sine, east])
    relative = counts / (len(direction) / counts.size)
    mesh = ax.pcolormesh(
        np.linspace(-np.pi, np.pi, 8 * columns + 1),  # fine, as the map bends every edge
        np.arcsin(np.linspace(-1, 1, 8 * rows + 1)),
        np.kron(relative, np.ones((8, 8))),
        cmap="viridis",
        vmin=0,
        vmax=max(2, relative.max()),
        rasterized=True,
    )
    bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.7)
    bar.set_label("density / uniform")
    ax.set_xticklabels([])
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.2)
    if title:
        ax.set_title(title)
    return ax


def distance_histogram(
    distances: ArrayLike,
    *,
    label: str | None = None,
    colour: str = COLOURS["true"],
    uniform: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of orientation distances, with the law of uniform orientations beside it."""
    ax = _axes(ax, figsize=(5, 3.2))
    edges = np.linspace(0, np.pi, 61)
    ax.hist(
        distances,
        edges.tolist(),
        density=True,
        histtype="stepfilled",
        alpha=0.35,
        color=colour,
        label=label,
    )
    if uniform and not any(line.get_gid() == "uniform" for line in ax.lines):
        law = (1 - np.cos(edges)) / np.pi
        ax.plot(
            edges, law, color=COLOURS["random"], ls="--", label="uniform on SO(3)", gid="uniform"
        )
    ax.set(xlabel="distance $d_q$ (rad)", ylabel="density (1/rad)", xlim=(0, np.pi))
    ax.legend(frameon=False, fontsize=8)
    return ax


def predicted_against_true(
    estimated: ArrayLike,
    true: ArrayLike,
    *,
    unit: str = "rad",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Estimated against true distances of pairs, as a density, with the median and the diagonal."""
    estimated, true = np.asarray(estimated), np.asarray(true)
    ax = _axes(ax, figsize=(4.2, 3.8))
    top = np.pi if unit == "rad" else np.percentile(estimated, 99.9) * 1.05
    ax.hist2d(true, estimated, bins=80, range=[[0, np.pi], [0, top]], cmap="Blues", norm="log")
    edges = np.linspace(0, np.pi, 25)
    which = np.digitize(true, edges) - 1
    middle = [np.median(estimated[which == k]) if (which == k).any() else np.nan for k in range(24)]
    ax.plot((edges[1:] + edges[:-1]) / 2, middle, color=COLOURS["estimated"], lw=2, label="median")
    if unit == "rad":
        ax.plot([0, np.pi], [0, np.pi], color=COLOURS["true"], lw=1, ls="--", label="exact")
    ax.set(xlabel="true distance $d_q$ (rad)", ylabel=f"estimated distance $d_p$ ({unit})")
    ax.set(xlim=(0, np.pi), ylim=(0, top))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    if title:
        ax.set_title(title)
    return ax


def curve(
    values: Sequence[float] | np.ndarray,
    *,
    x: ArrayLike | None = None,
    xlabel: str = "step",
    ylabel: str = "loss (rad²)",
    label: str | None = None,
    log: bool = True,
    ax: Axes | None = None,
    **style: Any,
) -> Axes:
    """Draw a curve of training or recovery."""
    ax = _axes(ax, figsize=(5, 3.2))
    x = np.arange(1, len(values) + 1) if x is None else x
    style = {"color": COLOURS["estimated"], "lw": 1.5, **style}
    ax.plot(x, values, label=label, **style)
    if log:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if label:
        ax.legend(frameon=False, fontsize=8)
    return ax


def error_histogram(
    errors_rad: ArrayLike,
    *,
    label: str | None = None,
    colour: str = COLOURS["estimated"],
    bins: int = 50,
    ax: Axes | None = None,
) -> Axes:
    """Histogram of orientation errors in degrees, with their mean."""
    ax = _axes(ax, figsize=(5, 3.2))
    degrees = np.rad2deg(errors_rad)
    ax.hist(degrees, bins, histtype="stepfilled", alpha=0.4, color=colour, label=label)
    ax.axvline(degrees.mean(), color=colour, lw=1.5, label=f"mean {degrees.mean():.2f}°")
    ax.set(xlabel="orientation error (degrees)", ylabel="images")
    ax.legend(frameon=False, fontsize=8)
    return ax


def fsc(curves: Mapping[str, Fsc], *, ax: Axes | None = None) -> Axes:
    """Fourier shell correlations.

    Parameters
    ----------
    curves : dict of str to Fsc
        By label; the labels ``true``, ``estimated``, ``baseline``, ``random`` at their start choose
        the colour.
    """
    ax = _axes(ax, figsize=(5.5, 3.4))
    for label, one in curves.items():
        at = one.resolution(0.5)
        sign = "≤" if at.nyquist_limited else ""
        ax.plot(
            one.frequencies,
            one.values,
            color=COLOURS.get(label.split()[0]),
            label=f"{label}: {sign}{at.angstrom:.1f} Å",
        )
    for threshold in (0.5, 0.143):
        ax.axhline(threshold, color="0.7", lw=0.8, ls=":")
    ax.set(xlabel="spatial frequency (1/Å)", ylabel="FSC", ylim=(-0.1, 1.03), xlim=(0, None))
    ax.legend(frameon=False, fontsize=8, title="resolution at FSC 0.5", title_fontsize=8)
    return ax


# --------------------------------------------------------------------------------------
# Interactive 3D, with a static picture beside it


def isosurface3d(
    density: Density, *, level: float | None = None, ax: Axes | None = None
) -> tuple[ipyvolume.Figure, Axes]:
    """Draw an isosurface: an ipyvolume figure, and the same seen along z, y and x as a picture.

    Parameters
    ----------
    density : Density
    level : float, optional
        Default: a fifth of the maximum.
    ax : matplotlib.axes.Axes, optional
        For the static picture.

    Returns
    -------
    figure : ipyvolume.Figure
        Show it as the cell's last value; it is empty paper where no widget runs.
    ax : matplotlib.axes.Axes
        The static picture: depth-shaded views of the same surface.
    """
    import ipyvolume as ipv

    from . import fourier

    v = density.values
    level = 0.2 * float(v.max()) if level is None else level
    inside = np.argwhere(v > level)
    middle = np.array(v.shape) // 2
    edge = 2 * int(np.abs(inside - middle).max(initial=1) + 3)
    v = fourier.crop_or_pad(v, (min(edge, min(v.shape)),) * 3)
    figure = ipv.figure(width=420, height=420)
    ipv.plot_isosurface(
        v.transpose(2, 1, 0), level=level, color="#7aa6c2", extent=[[0, len(v)]] * 3
    )
    ipv.xyzlim(0, len(v))
    ipv.style.use("minimal")
    fine = fourier.resize(v, 3 * len(v), 3)
    views = np.stack([_shaded(fine, level, axis) for axis in range(3)])
    ax = images(views, columns=3, pixel_size_angstrom=density.voxel_size_angstrom / 3, ax=ax)
    _name_views(ax)
    return figure, ax


def density3d(density: Density, *, ax: Axes | None = None) -> tuple[Any, Axes]:
    """Draw a density as a translucent volume: an ipyvolume figure, and its projections.

    Parameters
    ----------
    density : Density
    ax : matplotlib.axes.Axes, optional
        For the static picture.

    Returns
    -------
    figure : ipyvolume.Figure
    ax : matplotlib.axes.Axes
        The static picture: the density summed along z, y and x.
    """
    import ipyvolume as ipv

    v = density.values
    figure = ipv.figure(width=420, height=420)
    with np.errstate(invalid="ignore"):  # it divides by the gradient, which is zero outside
        ipv.volshow(v, level=[0.1, 0.4, 0.8], opacity=[0.02, 0.06, 0.1], controls=False)
    ipv.style.use("minimal")
    sums = np.stack([v.sum(axis=axis) for axis in range(3)])
    ax = images(sums, columns=3, pixel_size_angstrom=density.voxel_size_angstrom, ax=ax)
    _name_views(ax)
    return figure, ax


def _name_views(ax: Axes) -> None:
    for i, name in enumerate("zyx"):
        at = (i + 0.5) / 3, -0.02
        ax.text(*at, f"along {name}", transform=ax.transAxes, ha="center", va="top", fontsize=9)


def _shaded(values: np.ndarray, level: float, axis: int) -> np.ndarray:
    """Depth and slope of the first surface met along an axis, as a grey image."""
    v = np.moveaxis(values, axis, 0)
    solid = v > level
    hit = solid.any(axis=0)
    first = np.argmax(solid, axis=0)
    rows, columns = np.indices(first.shape)
    here, before = v[first, rows, columns], v[np.maximum(first - 1, 0), rows, columns]
    depth = first - (here - level) / np.maximum(here - before, 1e-9)
    depth = np.where(hit, depth, len(v))
    dy, dx = np.gradient(depth)
    light = (1 + 0.5 * dy + 0.5 * dx) / np.sqrt(1 + dx**2 + dy**2) / 1.5
    shade = 0.35 + 0.65 * np.clip(light, 0, 1)
    return np.where(hit, shade * (1 - 0.4 * depth / len(v)), 0)


def orientations3d(
    frames: Sequence[np.ndarray], *, reference: np.ndarray | None = None, ax: Axes3D | None = None
) -> tuple[ipyvolume.Figure, Axes3D]:
    """Draw orientations as points on the sphere of viewing directions.

    Parameters
    ----------
    frames : list of (n, 4) arrays
        One set, or several to animate (a recovery's snapshots).
    reference : (n, 4) array, optional
        True orientations: they colour the points by direction, so that order is seen to return.
    ax : matplotlib 3D axes, optional
        For the static picture.

    Returns
    -------
    figure : ipyvolume.Figure
    ax : matplotlib.axes.Axes
        The static picture of the last frame.
    """
    import ipyvolume as ipv
    import matplotlib.pyplot as plt

    points = np.stack([rotations.view_directions(q) for q in frames])  # (frames, n, 3)
    colours = _colours(frames[-1] if reference is None else reference)
    figure = ipv.figure(width=420, height=420)
    moving = points if len(frames) > 1 else points[0]
    scatter = ipv.scatter(
        *np.moveaxis(moving, -1, 0).astype(np.float32), color=colours, size=2.5, marker="sphere"
    )
    ipv.xyzlim(-1, 1)
    ipv.style.use("minimal")
    if len(frames) > 1:
        ipv.animation_control(scatter, interval=150, add=False)
    if ax is None:
        ax = plt.figure(figsize=(4, 4)).add_subplot(projection="3d")
    ax.scatter(*points[-1].T, c=colours, s=6, depthshade=False)
    ax.set_box_aspect((1, 1, 1))
    ax.set_axis_off()
    return figure, ax


def _colours(q: ArrayLike) -> np.ndarray:
    """Colours by viewing direction: (n, 3), in [0, 1]."""
    return 0.5 + 0.5 * rotations.view_directions(q)
