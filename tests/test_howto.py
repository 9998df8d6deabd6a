"""README's "Your own particles", run as it stands, on particles that RELION wrote.

``tests/relion`` holds 120 images of 4JSV, 44 px of 5 A, as ``relion_project`` 3.1.3 made them with
``--ctf --add_noise --white_noise`` at SNR 1/2: its projector, CTF, shifts, noise and STAR file.
"""

import functools
import gzip
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from measures import QUICK
from typer.testing import CliRunner

from cryoem import (
    abinitio,
    cli,
    estimator,
    evaluation,
    load_estimator,
    read_density,
    read_particles,
)

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"


def commands():
    """The commands of the section, until particles are simulated."""
    section = re.search(r"\n## Your own particles\n(.*?)\n## ", README.read_text(), re.DOTALL)[1]
    section = section.partition("Without particles of your own")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_the_section_has_commands():
    names = [(program, command) for program, command, *_ in commands()]
    assert {program for program, _ in names} == {"cryoem"}
    assert {"info", "solve", "density", "train", "orient", "refine"} <= {name for _, name in names}


def test_your_own_particles(tmp_path, monkeypatch):
    for name in ("particles.star", "particles.mrcs"):
        shutil.copy(HERE / "relion" / name, tmp_path)
    packed = (HERE.parent / "data" / "4JSV.pdb.gz").read_bytes()
    (tmp_path / "model.pdb").write_bytes(gzip.decompress(packed))
    monkeypatch.chdir(tmp_path)
    # Fewer rounds; and what an hour of training has made of this particle.
    few = functools.partial(abinitio.ab_initio, schedule=QUICK)
    monkeypatch.setattr(abinitio, "ab_initio", few)
    shipped = load_estimator("4jsv"), {"mae_rad": [0.0]}
    monkeypatch.setattr(estimator, "train_on", lambda *_, **__: shipped)
    for _, *arguments in commands():
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, (arguments, done.output)
    true = read_particles("particles.star")

    def off(path, over):
        found = read_particles(path)
        np.testing.assert_array_equal(found.images[:], true.images[:])
        return evaluation.orientation_errors(found.quaternions, true.quaternions, over=over)

    # Random orientations are 2.1 rad off.
    for path in ("folder/refined.star", "refined.star"):
        assert off(path, "one-sided").mean_rad < 0.05
    assert off("against.star", "none").mean_rad < 0.05  # in the map's own frame
    found = read_density("folder/refined.mrc")
    assert found.box_px == 44 and found.voxel_size_angstrom == pytest.approx(5.0)
