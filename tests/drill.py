"""Spoilt files: every reader gives a result or an error of ours, soon, in memory that they bound.

``python tests/drill.py [cases]`` runs many; test_drill.py runs a few.
"""

import gzip
import signal
import sys
import tempfile
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import particle_files

from cryoem import density, read_particles, rotations, write_particles
from cryoem.errors import CryoemError

#: CPU seconds for one file.
PATIENCE = 5.0

#: Bytes that reading may take: so many for each of the file's, and what an empty one takes.
PER_BYTE, AT_LEAST = 100, 4_000_000

#: What a token of a text file is replaced by.
TOKENS = (
    *(b"nan", b"inf", b"1e400", b"-1", b"0", b"99999999999999999999", b"9" * 5000, b"1_000"),
    *(
        b"",
        b"'",
        b'"',
        b"#",
        b";",
        b"\n",
        b"\n;\n",
        b"loop_",
        b"data_",
        b"data_optics",
        b"_x",
        b".",
    ),
    *(b"\x00", b"\xff", "é".encode(), b"%41", b"1@", b"@", b"0@particles.mrcs", b"../" * 2000),
    *(b"7@particles.mrcs", b"1@.", b"1@/dev/null", b"save_", b"stop_", b"global_", b"$x", b"[1]"),
)

#: What a word of a binary header is replaced by.
WORDS = (0, 1, -1, 2, 3, 4, 6, 12, 101, 2**31 - 1, -(2**31), 2**30, 2**16, 0x7FC00000, 0x7F800000)

PDB = b"".join(
    b"ATOM  %5d  CA  ALA A%4d    %8.3f%8.3f%8.3f  1.00  0.00           C\n"
    % (i, i, 3.8 * i, 2.0 * (i % 3), i)
    for i in range(1, 9)
)


class Hang(BaseException):
    """Nothing came of a file in time; no reader may catch it."""


def _read_particles(path: Path) -> None:
    particles = read_particles(path)
    particles.images[:]
    particles.ctf()
    particles.select(slice(2)).images[:]
    write_particles(path.with_name("again.star"), particles)
    read_particles(path.with_name("again.star"))


def _read_stack(path: Path) -> None:
    _read_particles(path.with_suffix(".star"))


def sources(folder: Path) -> dict[str, tuple[Path, bytes, int, Callable[[Path], object]]]:
    """Whole files in ``folder`` by kind: path, content, length of the header (0: text), reader."""
    new, old = particle_files.relion31(folder), particle_files.relion30(folder)
    cs, cut = particle_files.cryosparc(folder), folder / "map.mrc"
    density.write_density(cut, density.Phantom.random(0).density(8, 20.0))
    packed, model = folder / "map.mrc.gz", folder / "model.pdb"
    packed.write_bytes(gzip.compress(cut.read_bytes()))
    model.write_bytes(PDB)
    readers: dict[Path, tuple[int, Callable[[Path], object]]] = {
        new: (0, _read_particles),
        old: (0, _read_particles),
        cs: (cs.read_bytes().index(b"\n") + 1, _read_particles),
        new.with_suffix(".mrcs"): (1024, _read_stack),
        cut: (1024, density.read_density),
        packed: (0, density.read_density),
        model: (0, density.read_structure),
    }
    return {path.name: (path, path.read_bytes(), *rest) for path, rest in readers.items()}


def spoil(content: bytes, header: int, rng: np.random.Generator) -> bytes:
    """Spoil a file's content in one to three places, mostly in its header."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        end = min(header, len(data)) if header and rng.random() < 0.7 else len(data)
        at = int(rng.integers(0, max(end, 1)))
        match rng.integers(0, 6):
            case 0:  # cut short, or off in front
                data = data[:at] if rng.random() < 0.7 else data[at:]
            case 1:
                data[at : at + 1] = bytes([rng.integers(0, 256)])
            case 2:  # a piece twice, or not at all
                piece = bytes(data[at : at + int(rng.integers(1, 200))])
                data[at : at + len(piece)] = piece * int(rng.choice([0, 2, 20]))
            case 3 | 4 if header:
                word = WORDS[rng.integers(len(WORDS))]
                at -= at % 4
                data[at : at + 4] = int(word).to_bytes(
                    4, "little" if rng.random() < 0.8 else "big", signed=word < 2**31
                )
            case _:  # a token, or what looks like one
                stop = next((i for i in range(at, len(data)) if data[i] in b" \t\n,"), len(data))
                data[at:stop] = TOKENS[rng.integers(len(TOKENS))]
    return bytes(data)


def _hung(*_: object) -> None:
    raise Hang


def drill(cases: int, seed: int, folder: Path) -> Counter[tuple[str, str]]:
    """Read ``cases`` spoilt files; count what came of each kind, or raise at the first failure.

    Returns
    -------
    Counter
        Of (kind, "result" or the error's name).
    """
    whole = sources(folder)
    for path, _, _, reader in whole.values():  # what is imported on first use is not the file's
        reader(path)
    outcomes: Counter[tuple[str, str]] = Counter()
    signal.signal(signal.SIGVTALRM, _hung)
    tracemalloc.start()
    try:
        for case in range(cases):
            rng = rotations.generator([seed, case], "drill")
            kind = list(whole)[case % len(whole)]
            path, content, header, reader = whole[kind]
            if path.suffix == ".gz" and rng.random() < 0.7:  # a checksum hides nothing from us
                spoilt = gzip.compress(spoil(gzip.decompress(content), 1024, rng))
            else:
                spoilt = spoil(content, header, rng)
            path.write_bytes(spoilt)
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(path)
                outcome = "result"
            except CryoemError as error:
                outcome = type(error).__name__
            except BaseException as error:
                error.add_note(f"case {case} of seed {seed}: {path}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            took = tracemalloc.get_traced_memory()[1] - before
            # Deflate packs up to 1032 bytes into one.
            allowed = AT_LEAST + PER_BYTE * len(spoilt) * (10 if path.suffix == ".gz" else 1)
            assert took < allowed, f"case {case} of seed {seed}: {path}: {took:,} bytes"
            outcomes[kind, outcome] += 1
            path.write_bytes(content)
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    return outcomes


if __name__ == "__main__":
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    outcomes = drill(cases, 1, Path(tempfile.mkdtemp()))
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:16} {outcome:12} {count}")
