"""The project around the package: its order, its imports, the environments, the report."""

import ast
import graphlib
import importlib
import json
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
from cryoem import report, threads

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = ("requirements.demo.lock.txt", "requirements.lock.txt")


# --------------------------------------------------------------------------------------
# The order of the package

#: From the ground up: a module imports from its own line and from lines above it. A folder that is
#: named stands for all that is in it and is not named itself.
LAYERS = [
    line.split()
    for line in """
    errors threads version
    accelerator
    io.files
    fourier rotations symmetry distances
    aberrations
    imaging half_sets
    noise lazy_images
    particles
    workers single_images
    io
    density structures projection preprocessing simulation surveying
    backend
    estimator
    evaluation matching reconstruction
    recovery
    maps
    refinement
    abinitio
    plots
    report
    demo cli
    """.strip().splitlines()
]
#: What needs Keras or TensorFlow.
LEARNING = ("backend", "estimator", "recovery.descent")


def within(name, folders):
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def layer(name):
    """The line of a module: that of the longest folder that holds it."""
    found = [
        (len(folder), number)
        for number, line in enumerate(LAYERS)
        for folder in line
        if within(name, [folder])
    ]
    return max(found)[1] if found else None


def package():
    """Each module of the package, named without it: (path, syntax tree)."""
    modules = {}
    for path in sorted((ROOT / "cryoem").rglob("*.py")):
        parts = path.relative_to(ROOT / "cryoem").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = path, ast.parse(path.read_text())
    return modules


MODULES = package()


def statements(tree):
    """Import statements anywhere in a module, those for type checkers alone left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from statements(other)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from statements(node)


def imported(name):
    """The modules that a module imports: ours without the package's name, others dotted whole."""
    path, tree = MODULES[name]
    ours, others = set(), set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                (ours if first == "cryoem" else others).add(rest if first == "cryoem" else first)
            continue
        if node.level:
            here = name.split(".") if name else []
            inside = len(here) - node.level + (path.name == "__init__.py")
            base = [*here[:inside], *((node.module or "").split(".") if node.module else [])]
        elif node.module.split(".")[0] == "cryoem":
            base = node.module.split(".")[1:]
        else:
            others.add(node.module.split(".")[0])
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            ours.add(whole if whole in MODULES else ".".join(base))
    return ours - {name}, others


def test_every_module_has_a_place():
    assert [name for name in MODULES if name and layer(name) is None] == []
    assert [f for line in LAYERS for f in line if f not in MODULES] == []


def test_imports_point_upwards():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in sorted(imported(name)[0])
        if name and other and layer(other) > layer(name)
    ]
    assert wrong == []


def test_imports_have_no_circle():
    graph = {name: imported(name)[0] - {""} for name in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_are_found():
    """The reading of import statements above, on some that are known."""
    assert {"rotations", "symmetry", "errors", "io.files"} <= set(MODULES)
    assert imported("symmetry")[0] == {"fourier", "rotations", "errors"}
    assert "io.files" in imported("io.particles")[0]
    assert "plots" in imported("report")[0]  # as it is used


def test_only_the_backend_imports_keras_or_tensorflow():
    found = {
        (name, other)
        for name in MODULES
        for other in imported(name)[1] & {"keras", "tensorflow", "tensorflow_graphics", "tf_keras"}
    }
    assert found == {
        ("backend", "keras"),
        ("backend", "tensorflow"),
        ("recovery.descent", "tensorflow_graphics"),
    }


def test_only_what_learns_loads_the_backend():
    loads = {name for name in MODULES if "backend" in imported(name)[0]}
    assert loads and all(within(name, LEARNING) for name in loads)
    lazily = {name for name, (module, _) in cryoem.PUBLIC.items() if within(module, LEARNING)}
    assert lazily == {"Estimator", "train", "load_estimator", "descend"}


def test_no_module_is_long():
    long = {n: len(p.read_text().splitlines()) for n, (p, _) in MODULES.items()}
    offenders = {name: lines for name, lines in long.items() if lines > 450}
    assert not offenders, offenders


def test_no_function_is_long():
    long = {
        f"{name}:{node.name}": node.end_lineno - node.lineno + 1
        for name, (_, tree) in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    offenders = {name: lines for name, lines in long.items() if lines > 80}
    assert not offenders, offenders


# --------------------------------------------------------------------------------------
# The package as it is imported


EACH_ALONE = """
import json, sys

heavy, names, modules = {"tensorflow", "keras", "astra", "matplotlib"}, *json.loads(sys.argv[1])
wrong = []
for name in ["", *names, *modules]:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "cryoem"]:
        del sys.modules[loaded]
    import cryoem
    if name in names:
        getattr(cryoem, name)
    elif name:
        __import__(f"cryoem.{name}")
    if heavy & set(sys.modules):
        wrong.append([name, sorted(heavy & set(sys.modules))])
        break
print(json.dumps(wrong))
"""


def test_all_but_learning_loads_without_tensorflow():
    """And each public name and module as the first that is asked for."""
    names = [n for n, (module, _) in cryoem.PUBLIC.items() if not within(module, LEARNING)]
    modules = [m for m in MODULES if m and not within(m, LEARNING) and m != "cli.__main__"]
    assert len(names) > 20 and {"rotations", "recovery", "plots", "cli"} <= set(modules)
    code = [sys.executable, "-c", EACH_ALONE, json.dumps([names, modules])]
    done = subprocess.run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_every_public_name_is_there():
    for name in cryoem.__all__:
        assert getattr(cryoem, name) is not None, name
    assert set(cryoem.__all__) <= set(dir(cryoem))
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = cryoem.nothing_of_that_name


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "cli.__main__")])
def test_every_module_says_what_it_offers(name):
    module = importlib.import_module(f"cryoem.{name}")
    assert module.__doc__
    for offered in getattr(module, "__all__", []):
        assert hasattr(module, offered), offered


def test_the_version_is_the_projects():
    assert cryoem.__version__ == PROJECT["version"]


# --------------------------------------------------------------------------------------
# The environments


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def lock(name="requirements.lock.txt"):
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins(name)}


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
    ("file", "requirement"),
    [
        (file, line)
        for file, wanted in zip(LOCKS, (["tensorflow"], list(EXTRAS)), strict=True)
        for lines in [PROJECT["dependencies"], *(EXTRAS[extra] for extra in wanted)]
        for line in sorted(set(lines))
    ],
)
def test_the_locks_satisfy_the_project(file, requirement):
    wanted = Requirement(requirement)
    assert wanted.specifier.contains(lock(file)[canonicalize_name(wanted.name)])


@pytest.mark.parametrize("file", LOCKS)
def test_the_locks_are_exact(file):
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins(file))
    assert len(lock(file)) == len(pins(file))


def test_the_demo_installs_a_part_of_the_rest():
    """So that either can be made first, and the other on top of it."""
    demo, everything = (lock(file) for file in LOCKS)
    assert demo.items() < everything.items()
    large = {"aspire", "astra-toolbox", "dask", "jupyter", "nvidia-cufft-cu12", "scikit-learn"}
    assert large <= set(everything) and not large & set(demo)


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
    assert found["cores"] == threads.count()
    assert report.peak_memory_gb() > 0.01
