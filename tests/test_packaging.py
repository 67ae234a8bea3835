"""What is built, installed and imported: the wheel, the two symlinks, the layers, and nothing of one machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SOURCES = sorted(p.relative_to(ROOT) for folder in SETTINGS["package-dir"].values() for p in (ROOT / folder).glob("*.py"))

pytestmark = pytest.mark.xdist_group("packaging")  # with --dist loadgroup, one worker builds once


def run(*command, cwd, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "PYTEST_"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**clean, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def git(*arguments):
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    return run("git", "ls-files", "-z", *arguments, cwd=ROOT).split("\0")[:-1]


@pytest.fixture(scope="module")
def tracked():
    """Paths that git tracks, or would with the next ``git add``; on a clean checkout just the former."""
    return [path for path in git("--cached", "--others", "--exclude-standard") if os.path.lexists(ROOT / path)]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """A copy of the tracked files, with the sdist, and the wheel made from the sdist, in ``dist``."""
    copy = tmp_path_factory.mktemp("build") / "copy"
    for path in tracked:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", ".", cwd=copy)
    return copy


# -- what is declared ----------------------------------------------------------------------------------------------------------


def test_every_package_folder_is_declared():
    found = {}
    for name, folder in {"pyrocausal": "pyrocausal", "pyrocausal.models": "models", "pyrocausal.guides": "guides"}.items():
        for parent, folders, files in os.walk(ROOT / folder):  # does not follow the symlinks
            folders[:] = [f for f in folders if f != "__pycache__"]
            if "__init__.py" in files:
                found[".".join([name, *Path(parent).relative_to(ROOT / folder).parts])] = Path(parent).relative_to(ROOT).as_posix()
    assert sorted(SETTINGS["packages"]) == sorted(found)
    assert {name: SETTINGS["package-dir"].get(name) for name in found} == found


@pytest.mark.parametrize("name", ["models", "guides"])
def test_symlinks_make_the_checkout_a_package(name):
    (entry,) = git("--stage", f"pyrocausal/{name}")
    assert entry.startswith("120000 ")
    link = ROOT / "pyrocausal" / name
    assert str(link.readlink()) == f"../{name}"
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


# -- what is built and installed -----------------------------------------------------------------------------------------------


def test_wheel_from_the_sdist_has_every_module(built, tracked):
    (wheel,) = (built / "dist").glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = [p for p in tracked if p.endswith(".py") and p.split("/")[0] in ("pyrocausal", "models", "guides")]
    assert names == {p if p.startswith("pyrocausal/") else f"pyrocausal/{p}" for p in sources} | {"pyrocausal/py.typed"}
    assert {"pyrocausal/models/sams_vae.py", "pyrocausal/guides/sams_vae.py"} <= names


@pytest.mark.parametrize("way", ["wheel", "folder", "editable"])
def test_install_imports_from_elsewhere(way, built, tmp_path):
    """Into a bare environment that sees this one's packages, but not this one's pyrocausal (its own folder comes first)."""
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", "--symlinks", env, cwd=tmp_path)
    python = env / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "outer.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_path(p) for p in ("purelib", "platlib"))))
    what = {"wheel": [next((built / "dist").glob("*.whl"))], "folder": [built], "editable": ["-e", built]}[way]
    options = ["-q", "--no-deps", "--no-build-isolation", "--ignore-installed", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=tmp_path)
    modules = ["pyrocausal", "pyrocausal.data", "pyrocausal.models.sams_vae", "pyrocausal.guides.sams_vae"]
    code = f"import sys, {', '.join(modules)}\nfor m in {modules}: print(sys.modules[m].__file__)"
    files = [Path(f).resolve() for f in run(python, "-c", code, cwd=tmp_path).split()]
    home = built if way == "editable" else site / "pyrocausal"
    assert len(files) == 4 and all(f.is_relative_to(home.resolve()) for f in files), files


# -- what is imported ----------------------------------------------------------------------------------------------------------


def test_import_is_light_and_leaves_pyro_alone():
    code = """
import sys, pyro
import pyrocausal
print([m for m in ("arviz", "matplotlib", "scanpy", "sklearn", "pyrocausal.models", "pyrocausal.guides") if m in sys.modules])
print(list(pyro.get_param_store()), pyro.settings.get("module_local_params"))
"""
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines() == ["[]", "[] True"]


def imported(source, package, everywhere=False):
    """Names that a module imports when it is imported, or ``everywhere`` in it; ``from a import b`` counts as ``a`` and ``a.b``."""
    names, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        if everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def layers(names):
    return {n.split(".")[1] for n in names if n.startswith(("pyrocausal.models", "pyrocausal.guides"))}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pyrocausal.models.sams_vae", {"models"}),
        ("from pyrocausal import guides, data", {"guides"}),
        ("from .models import SAMSVAE", {"models"}),
        ("from . import guides as g", {"guides"}),
        ("if True:\n    try:\n        from pyrocausal.models import SAMSVAE\n    except ImportError: pass", {"models"}),
        ("class A:\n    from pyrocausal import models", {"models"}),
        ("def f():\n    from pyrocausal.guides import SAMSVAE", set()),
        ("from pyrocausal.data import models", set()),
    ],
)
def test_imports_are_found(source, expected):
    assert layers(imported(source, "pyrocausal")) == expected


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_layers(path):
    """The core imports neither models nor guides when it is imported; models never import guides; guides may import models."""
    folder, source = path.parts[0], (ROOT / path).read_text()
    if folder == "pyrocausal":
        assert layers(imported(source, "pyrocausal")) == set()
    elif folder == "models":
        assert "guides" not in layers(imported(source, "pyrocausal.models", everywhere=True))
    for name in imported(source, "pyrocausal", everywhere=True):
        assert name.split(".")[0] not in ("models", "guides", "tests"), f"{name} exists in the checkout only"


# -- what is committed ---------------------------------------------------------------------------------------------------------

MACHINE = re.compile(rb"(?<![\w.])/(?:work|root|opt|home|tmp)/[\w.]", re.IGNORECASE)
REGISTRY = re.compile(
    rb"\bpypi\.(?:org|python)|pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|--(?:extra-)?index-url", re.I
)


@pytest.mark.parametrize("line", ["open('{}work/x')", "({}root/.cache", "{}tmp/venv/lib", '"{}home/me/x"'])
def test_machine_paths_are_found(line):
    assert MACHINE.search(line.format("/").encode())  # put together here, so that this file holds none


@pytest.mark.parametrize("line", ["https://github.com/a{}work/b", "..{}shared/work/x", "homework{}roots"])
def test_other_paths_are_not(line):
    assert not MACHINE.search(line.format("/").encode())


def test_no_machine_path_and_no_registry_is_committed(tracked):
    own = Path(__file__).resolve()
    found = [
        f"{path}: {hit.group().decode()}"
        for path in tracked
        if (ROOT / path).is_file() and (ROOT / path).resolve() != own
        for pattern in (MACHINE, REGISTRY)
        if (hit := pattern.search((ROOT / path).read_bytes()))
    ]
    assert found == []
