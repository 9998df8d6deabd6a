"""Rounds of a refinement, kept in a folder: a process may end at any moment, the next goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..io import files
from ..io.stacks import told_apart
from ..noise import Noise
from ..particles import ParticleStack
from ..version import __version__
from .fit import RefinedStack

__all__ = ["FILES", "Kept", "Rounds"]

#: What stands in the folder: the rounds of all particles, and those of a part of many.
FILES = "rounds.npz", "part.npz"
#: Of every particle, as its half was refined.
_ROWS = (
    "quaternions", "shifts_px", "contrast", "expected_error_rad", "covariances",
    "shift_covariances", "chi2", "gain", "correlation",
)  # fmt: skip
_NUMBERS = ("noise_variance", "resolution_angstrom")
#: Images in files that are looked at, to tell one stack from another.
LOOKED_AT = 64


@dataclass(frozen=True, eq=False)
class Rounds:
    """What the rounds have come to.

    Attributes
    ----------
    separate : RefinedStack or None
        As the last round has refined each half; None: there was none.
    now : ParticleStack
        What the next one starts from.
    used : tuple of float
        Resolutions, angstrom: that of the beginning, and of every round.
    ended : bool
        Orientations have settled, or there were as many rounds as were told.
    sought : bool
        Particles that lay astray have been sought a last time, by the map of the other half.
    astray : float
        Share of them that were found then.
    """

    separate: RefinedStack | None
    now: ParticleStack
    used: tuple[float, ...]
    ended: bool = False
    sought: bool = False
    astray: float = 0.0

    @property
    def count(self) -> int:
        """How many rounds there were."""
        return len(self.used) - 1


class Kept:
    """The folder.

    Parameters
    ----------
    folder : path, optional
        None: nothing is kept.
    given : ParticleStack
        What the refinement starts from, with half-sets.
    settings : dict
        All else that its rounds depend on.
    part : bool
        These are a part of the particles.
    """

    def __init__(
        self,
        folder: files.PathLike | None,
        given: ParticleStack,
        settings: Mapping[str, object],
        *,
        part: bool = False,
    ) -> None:
        self.path = None if folder is None else Path(folder) / FILES[part]
        self.given, self.settings, self._made_of = given, dict(settings), (folder, settings)
        if self.path is not None:
            files.check_writable(self.path)
            self.settings |= _told(given)

    def of_part(self, given: ParticleStack) -> Kept:
        """The same for a part of the particles."""
        folder, settings = self._made_of
        return Kept(folder, given, settings, part=True)

    def read(self) -> Rounds | None:
        """What an earlier run has come to; None: there was none.

        Raises
        ------
        InputError
            It was another run, or the file is not one of these.
        """
        if self.path is None or not self.path.exists():
            return None
        arrays = files.read_npz(
            self.path, "rounds of a refinement", needed=("state", "power", "next", *_ROWS)
        )
        try:
            state = json.loads(str(arrays["state"]))
            before = dict(state["settings"])
            rows = {name: arrays[name] for name in _ROWS}
            if any(len(values) != len(self.given) for values in rows.values()):
                raise ValueError("arrays of another number of particles")
            separate = self.given.extended(
                RefinedStack,
                **rows,
                **{name: float(state[name]) for name in _NUMBERS},
                noise=Noise(arrays["power"]),
            )
            used = tuple(map(float, state["used"]))
            ended, sought = bool(state["ended"]), bool(state.get("sought", False))
            astray = float(state.get("astray", 0.0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: not rounds of a refinement ({error})") from error
        files.same_run(self.path.parent, before, self.settings)
        now = rescaled(separate).with_poses(arrays["next"][:, :4], arrays["next"][:, 4:])
        return Rounds(separate, now, used, ended, sought, astray)

    def write(self, rounds: Rounds) -> None:
        """Keep what the rounds have come to."""
        if self.path is None:
            return
        separate = rounds.separate
        assert separate is not None and separate.noise is not None
        state = {
            "settings": self.settings,
            "used": rounds.used,
            "ended": rounds.ended,
            "sought": rounds.sought,
            "astray": rounds.astray,
            **{name: getattr(separate, name) for name in _NUMBERS},
        }
        arrays = {name: getattr(separate, name) for name in _ROWS}
        arrays["power"] = separate.noise.power
        arrays["next"] = np.hstack([rounds.now.oriented(), rounds.now.shifts_px])
        files.write_npz(self.path, state, arrays)


def rescaled(stack: RefinedStack) -> RefinedStack:
    """Contrasts about 1: the scale of contrast and density together is free."""
    return stack.replace(contrast=stack.contrast / np.median(stack.contrast))


def _told(stack: ParticleStack) -> dict[str, object]:
    """What tells one particle stack from another."""
    n = len(stack)
    some = np.unique(np.linspace(0, n - 1, min(n, LOOKED_AT)).astype(int))
    first = stack.select(some).images[:]
    ctf = stack.ctf_parameters
    known = [] if ctf is None else [np.asarray(getattr(ctf, f.name)) for f in fields(ctf)]
    if stack.noise is not None:
        known.append(stack.noise.power)
    poses = [stack.oriented(), stack.shifts_px, stack.optics_group]
    if stack.half_set is not None:
        poses.append(stack.half_set)
    return {
        "version": __version__,
        "particles": [n, stack.box_px, stack.pixel_size_angstrom],
        "images_sha256": files.sha256_of(chain([first], told_apart(stack.images))),
        "poses_sha256": files.sha256_of(poses),
        "microscope_sha256": files.sha256_of(known),
    }
