"""Small changes to the code that no test notices: ``make mutants`` (half an hour).

Draws changes at random (a sign, a comparison, a number, a loop that ends early, ...) in the folders
below, makes one at a time in a copy of the package, and runs the tests of that folder. What no test
notices is printed as a diff, and the score at the end. ``python tests/mutants.py maps --number 30``
takes 30 changes in one folder. Needs cosmic-ray, which the target installs.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor

ROOT = Path(__file__).parent.parent
#: The tests that each folder answers to.
TESTS = {
    "recovery": ["test_recovery", "test_frame", "test_symmetry", "test_descent"],
    "refinement": ["test_noise", "test_refinement"],
    "maps": ["test_maps"],
    "io": ["test_particle_files", "test_particles"],
}
#: Unions stand in annotations, which nobody runs; the others change no outcome.
LEFT_OUT = ("BitOr", "ExceptionReplacer", "AddNot", "RemoveDecorator", "Variable")
PATIENCE = 600  # seconds for the tests of one change: a loop that never ends is noticed


def positions(path):
    """All (operator's name, occurrence) of a module."""
    tree = get_ast(path.read_text())
    for name in plugins.operator_names():
        if any(part in name for part in LEFT_OUT):
            continue
        visitor = MutationVisitor(-1, plugins.get_operator(name)())
        visitor.walk(tree)
        for occurrence in range(visitor._count):
            yield name, occurrence


def noticed(copy, tests):
    """Whether a test fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [str(copy / "tests" / f"{test}.py") for test in tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OPENBLAS_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return True
    return run.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--number", type=int, default=25, help="of changes, a folder")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if unknown := set(options.folders) - set(TESTS):  # choices would refuse none, on Python 3.11
        parser.error(f"no folder {', '.join(unknown)}")
    total = killed = 0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for part in ("cryoem", "tests"):
            shutil.copytree(ROOT / part, copy / part)
        for part in ("data", "pyproject.toml"):
            (copy / part).symlink_to(ROOT / part)
        for folder in options.folders or TESTS:
            every = [
                (path, *position)
                for path in sorted((copy / "cryoem" / folder).glob("*.py"))
                for position in positions(path)
            ]
            if not noticed(copy, [*TESTS[folder]]):
                print(f"{folder}: {len(every)} possible changes", flush=True)
            else:
                sys.exit(f"{folder}: its tests fail without any change")
            some = random.Random(options.seed).sample(every, min(options.number, len(every)))
            seen = 0
            for path, name, occurrence in some:
                before = path.read_text()
                operator = plugins.get_operator(name)()
                after = MutationVisitor.mutate_code(before, operator, occurrence)
                path.write_text(after)
                if noticed(copy, TESTS[folder]):
                    seen += 1
                else:
                    show(path.relative_to(copy), before, after)
                path.write_text(before)
            print(f"{folder}: {seen} of {len(some)} changes noticed (seed {options.seed})")
            total, killed = total + len(some), killed + seen
    print(f"{killed} of {total} changes noticed")


def show(path, before, after):
    """Print the lines that differ."""
    for number, (old, new) in enumerate(
        zip(before.splitlines(), after.splitlines(), strict=False), start=1
    ):
        if old != new:
            print(f"{path}:{number}\n-{old}\n+{new}", flush=True)
            break


if __name__ == "__main__":
    main()
