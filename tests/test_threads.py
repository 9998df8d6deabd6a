"""One number of threads for everything, and TensorFlow that says nothing as it starts."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cryoem import threads
from cryoem.errors import InputError

PACKAGE = Path(__file__).resolve().parent.parent / "cryoem"


@pytest.fixture
def python(tmp_path):
    """Run code in a Python of its own, without the variables that conftest sets."""

    def run(code, **variables):
        ours = ("CRYOEM_THREADS", "OPENBLAS_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL", "KERAS_BACKEND")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment["PYTHONPATH"] = str(tmp_path)
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **variables},
            capture_output=True,
            text=True,
        )

    return run


# --------------------------------------------------------------------------------------
# The number


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two", "²"])
def test_the_variable_must_be_a_positive_integer(monkeypatch, value):
    monkeypatch.setenv("CRYOEM_THREADS", value)
    with pytest.raises(InputError, match=f"CRYOEM_THREADS must be a positive integer.*{value}"):
        threads.count.__wrapped__()


def test_the_command_line_says_so_too():
    code = "from cryoem.cli import app; app(['info', 'nothing.star'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CRYOEM_THREADS": "abc"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("cryoem: the environment variable CRYOEM_THREADS must be")
    assert "Traceback" not in done.stderr


def test_the_variable_overrides_and_an_empty_one_does_not(monkeypatch):
    monkeypatch.setenv("CRYOEM_THREADS", " 3 ")
    assert threads.count.__wrapped__() == 3
    monkeypatch.setenv("CRYOEM_THREADS", "")
    assert threads.count.__wrapped__() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("found", "expected"), [(6, 6), (None, 1)])
def test_without_affinity_the_machine_counts(monkeypatch, found, expected):
    monkeypatch.delenv("CRYOEM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: found)
    assert threads.count.__wrapped__() == expected


def test_a_wrong_variable_is_an_input_error_as_the_package_is_used(python):
    done = python("import cryoem; from cryoem import fourier", CRYOEM_THREADS="all")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "cryoem.errors.InputError: the environment variable CRYOEM_THREADS must be a positive "
        "integer, got 'all'"
    )


USES = """
import json, os
if {cpus}:
    os.sched_setaffinity(0, {cpus})
import finufft, numpy as np
plan, asked = finufft.Plan, []

def recorded(*arguments, **options):
    asked.append(options.get("nthreads"))
    return plan(*arguments, **options)

finufft.Plan = recorded
from cryoem import density, fourier, projection
from cryoem.backend import tf
import threadpoolctl
projection.project(density.Phantom.random(0).density(16, 7.0), np.eye(4)[3:])
tf.ones(2)  # it starts
config = tf.config.threading
print(json.dumps({{
    "fft": fourier.WORKERS,
    "finufft": asked,
    "blas": [i["num_threads"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "blas"],
    "tensorflow": [config.get_intra_op_parallelism_threads(),
                   config.get_inter_op_parallelism_threads()],
}}))
"""


@pytest.mark.parametrize(
    ("cpus", "variables", "expected"),
    [
        ("{min(os.sched_getaffinity(0))}", {}, 1),
        ("None", {"CRYOEM_THREADS": "3", "OPENBLAS_NUM_THREADS": "1"}, 3),
    ],
    ids=["one CPU of several", "the variable"],
)
def test_everything_uses_the_number(python, cpus, variables, expected):
    done = python(USES.format(cpus=cpus), **variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fft"] == expected
    assert found["finufft"] and set(found["finufft"]) == {expected}
    assert len(found["blas"]) >= 2 and set(found["blas"]) == {expected}  # NumPy's and SciPy's
    assert found["tensorflow"] == [expected, expected]
    assert done.stderr == ""  # finufft warns of more threads than it finds CPUs


def test_every_nufft_is_told_its_threads():
    """Without ``showwarn=0`` it warns on stderr wherever hardware threads are two a core."""
    calls = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("finufft."):
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                told = options.get("nthreads"), options.get("showwarn")
                calls.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", told))
    assert len(calls) >= 3
    # One thread each where as many tasks run beside each other as there are threads.
    each = ("threads.count()", "1")
    untold = [call for call in calls if call[1][0] not in each or call[1][1] != "0"]
    assert not untold, untold


BESIDE = """
import threading
import numpy as np, threadpoolctl
from cryoem import threads

meeting = threading.Barrier(3, timeout=60)

def alone(i):
    meeting.wait()  # only where three are under way
    return i, {k["num_threads"] for k in threadpoolctl.threadpool_info() if k["user_api"] == "blas"}

print(list(threads.each(alone, range(6))))
taken = []
for i, found in enumerate(threads.each(lambda x: x, (taken.append(x) or x for x in range(100)))):
    assert found == i and len(taken) < i + 20
begun = []

def failing(i):
    begun.append(i)
    return 1 / (i - 2)

try:
    list(threads.each(failing, range(10_000)))
except ZeroDivisionError:
    print(len(begun) < 20)
"""


def test_as_many_run_beside_each_other_as_there_are_threads(python):
    done = python(BESIDE, CRYOEM_THREADS="3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[(i, {1}) for i in range(6)]}\nTrue\n"


# --------------------------------------------------------------------------------------
# The quiet


FIT = """
from cryoem.backend import keras
import numpy as np

class Images(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return np.ones((4, 8, 8, 1), "f"), np.ones((4, 1), "f")

layers = keras.layers
model = keras.Sequential(
    [keras.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(1)]
)
model.compile("adam", "mse")
model.fit(Images(), verbose=0)
model.fit(*Images()[0], verbose=0)
model.predict(Images()[0][0], verbose=0)
"""


def test_tensorflow_says_nothing_and_keeps_onednn(python):
    quiet = python(FIT)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    # On every CPU, also on those that TensorFlow would not turn it on for.
    loud = python("import cryoem.backend", TF_CPP_MIN_LOG_LEVEL="0")
    assert "oneDNN custom operations are on" in loud.stderr
    plain = python("import cryoem.backend", TF_CPP_MIN_LOG_LEVEL="0", TF_ENABLE_ONEDNN_OPTS="0")
    assert "oneDNN" not in plain.stderr


KERAS = """
import os
os.write(2, b"I0000 00:00:1795629855.927771    2621 port.cc:153] what it always says\\n")
os.write(2, b"E0000 00:00:1795629855.927771    2621 port.cc:153] an error\\n")
os.write(2, b"from somebody else\\n")
{}
"""


def test_only_records_below_the_level_are_held_back(python, tmp_path):
    (tmp_path / "keras.py").write_text(
        KERAS.format("class backend: backend = staticmethod(lambda: 'jax')")
    )
    done = python("import cryoem.backend, sys; print('tensorflow' in sys.modules)")
    assert done.stdout == "False\n"  # Keras runs on another backend
    assert [line.split("] ")[-1] for line in done.stderr.splitlines()] == [
        "an error",
        "from somebody else",
    ]


def test_an_import_that_fails_shows_all_that_was_written(python, tmp_path):
    (tmp_path / "keras.py").write_text(KERAS.format("raise ImportError('no such instruction')"))
    done = python("import cryoem.backend")
    assert "what it always says" in done.stderr
    assert done.stderr.endswith("ImportError: no such instruction\n")


@pytest.mark.parametrize("missing", ["keras", "tensorflow"])
def test_without_keras_or_tensorflow_an_error_of_ours_names_it(python, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from cryoem.backend import tf"
    done = python(code, KERAS_BACKEND="tensorflow")
    assert f"MissingToolError: networks and gradient descent need {missing}" in done.stderr


@pytest.mark.parametrize(("told", "arenas"), [({}, 2), ({"MALLOC_ARENA_MAX": "4"}, 4)])
def test_threads_share_arenas(python, told, arenas):
    """Six threads had six, and what one had freed was kept from the others."""
    code = """
import ctypes, threading
from cryoem import threads
libc, together = ctypes.CDLL(None), threading.Barrier(6)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def work():
    libc.malloc(4096)
    together.wait()
all_of_them = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in all_of_them]
[t.join() for t in all_of_them]
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""
    done = python(code, CRYOEM_THREADS="2", **told)
    assert done.stdout.count("<heap nr=") == arenas
