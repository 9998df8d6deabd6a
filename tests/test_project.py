"""The project around the package: imports, the environment, the report."""

import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cryoem
from cryoem import report

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: The only modules that import TensorFlow.
LEARNING = {"estimator", "networks", "descent"}


def lock():
    lines = (ROOT / "requirements.lock.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def test_only_learning_imports_tensorflow():
    modules = [m.name for m in pkgutil.iter_modules(cryoem.__path__) if m.name not in LEARNING]
    assert {"rotations", "recovery", "orient", "plots"} <= set(modules)
    code = "; ".join(
        ["import sys, cryoem"]
        + [f"import cryoem.{name}" for name in modules]
        + ["print(sorted({'tensorflow', 'keras', 'astra', 'matplotlib'} & set(sys.modules)))"]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_offers():
    import importlib

    for info in pkgutil.iter_modules(cryoem.__path__):
        module = importlib.import_module(f"cryoem.{info.name}")
        assert module.__doc__, info.name
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{info.name}.{name}"


def test_the_version_is_the_projects():
    assert cryoem.__version__ == PROJECT["version"]


def requirements(lines):
    return sorted(str(Requirement(line)) for line in lines)


def test_the_conda_environment_installs_what_the_project_needs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (nested,) = (entry for entry in environment["dependencies"] if isinstance(entry, dict))
    assert plain == ["python=3.11", "pip"] and list(nested) == ["pip"]
    wanted = PROJECT["dependencies"] + [
        line for extra in ("tensorflow", "astra", "notebooks") for line in EXTRAS[extra]
    ]
    assert requirements(nested["pip"]) == requirements(wanted)


def test_tensorflow_graphics_is_installed_alone_and_as_locked():
    commands = [
        line.strip()
        for line in (ROOT / "postBuild").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert f"pip install --no-deps tensorflow-graphics=={lock()['tensorflow-graphics']}" in commands


@pytest.mark.parametrize(
    "requirement",
    sorted({line for lines in [PROJECT["dependencies"], *EXTRAS.values()] for line in lines}),
)
def test_the_lock_satisfies_the_project(requirement):
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(lock()[canonicalize_name(wanted.name)])


def test_the_lock_is_exact():
    lines = (ROOT / "requirements.lock.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    assert len(lock()) == sum("==" in line for line in lines)


# --------------------------------------------------------------------------------------
# The report


def test_a_report_is_one_page_with_its_pictures_inside(tmp_path):
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    parts = ["a < b", [["name", "value"], ["x & y", 3]], (figure, 'said "so"')]
    report.write(tmp_path / "report.html", "Title", [("Heading", parts)])
    plt.close(figure)
    page = (tmp_path / "report.html").read_text()
    for text in ("<h1>Title</h1>", "a &lt; b", "<td>x &amp; y</td>", "data:image/png;base64,"):
        assert text in page
    assert "http://" not in page and "https://" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_environment_names_its_versions():
    import numpy

    found = report.environment()
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["cores"] >= 1
    assert report.peak_memory_gb() > 0.01
