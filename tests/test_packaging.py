"""What is installed: every package, every data file, types, the command; and arrows that point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "zsq_deploy": ROOT / "zsq_deploy",
    "zsq_deploy.backends": ROOT / "backends",
    "zsq_deploy.calib": ROOT / "calib",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> dict[str, Path]:
    """Import name -> file of every module that is installed."""
    found = {}
    for name, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((name, *parts))] = file
    return found


MODULES = modules()


def imports(file: Path, *, runtime_only: bool = False) -> set[str]:
    """What a file imports, wherever in it; `runtime_only` leaves out what only the type checker sees."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if runtime_only and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped.update(inner for part in node.body for inner in ast.walk(part))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            base = node.module or ""
            found.update({base} | {f"{base}.{alias.name}" for alias in node.names})
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_package_is_listed():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    folders = {
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in SOURCES.items()
        for file in folder.rglob("*.py")
    }
    assert set(listed) == folders
    assert len(listed) == len(set(listed))
    for name, folder in SOURCES.items():
        for inner in {file.parent for file in folder.rglob("*.py")}:
            assert (inner / "__init__.py").is_file(), f"{name}: {inner} has no __init__.py"


def test_the_top_level_is_that_of_the_design():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert top == {"zsq_deploy", "backends", "calib", "tests", "tools", ".ci"}
    files = {line for line in tracked.stdout.splitlines() if "/" not in line}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "Makefile", ".gitignore"}
    assert wanted <= files <= wanted | {"CONTRIBUTING.md", ".gitattributes", ".editorconfig"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names in a wheel that is built from a copy of what is tracked or would be."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    source.mkdir()
    import shutil

    keep = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in ("zsq_deploy", "backends", "calib"):
        shutil.copytree(ROOT / name, source / name, ignore=keep)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(home), "."],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = home.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "zsq = zsq_deploy.cli:main" in archive.read(entry).decode()
        return archive.namelist()


def test_the_wheel_holds_everything(wheel):
    held = {name for name in wheel if ".dist-info/" not in name}
    wanted = set()
    for name, folder in SOURCES.items():
        for file in folder.rglob("*"):
            parts = file.relative_to(folder).parts
            if file.is_file() and "__pycache__" not in parts and not any(part.endswith(".egg-info") for part in parts):
                wanted.add("/".join((name.replace(".", "/"), *parts)))
    assert held == wanted
    assert {name for name in held if not name.startswith("zsq_deploy/")} == set()
    for name in (
        "py.typed",
        "report/report.css",
        "report/report.html.j2",
        "docs/report.schema.json",
        "backends/base.py",
    ):
        assert f"zsq_deploy/{name}" in held
    assert any("licenses/LICENSE" in name for name in wheel)


def test_versions_agree():
    import zsq_deploy

    assert PROJECT["project"]["version"] == zsq_deploy.__version__
    assert (
        f"## {zsq_deploy.__version__}" in (ROOT / "CHANGELOG.md").read_text()
        or "Unreleased" in (ROOT / "CHANGELOG.md").read_text()
    )


# Who may import whom inside the project: a part may use itself, those listed here, and the words that all share.
SHARED = ("zsq_deploy.errors", "zsq_deploy.artifact", "zsq_deploy.progress")
ARROWS = {
    "zsq_deploy.errors": (),
    "zsq_deploy.artifact": (),
    "zsq_deploy.progress": (),
    "zsq_deploy.docs": (),
    "zsq_deploy.model": (),
    "zsq_deploy.quant": ("zsq_deploy.model",),
    "zsq_deploy.evaldata": ("zsq_deploy.model",),
    "zsq_deploy.recipe": (),
    "zsq_deploy.calib": ("zsq_deploy.model", "zsq_deploy.quant"),
    "zsq_deploy.verify": ("zsq_deploy.model", "zsq_deploy.quant", "zsq_deploy.evaldata"),
    "zsq_deploy.report": ("zsq_deploy.model", "zsq_deploy.quant", "zsq_deploy.verify", "zsq_deploy.docs"),
    "zsq_deploy.backends": ("zsq_deploy.model", "zsq_deploy.quant"),
    "zsq_deploy.demo": (),
    "zsq_deploy.device": (),
    "zsq_deploy.pipeline": (
        "zsq_deploy.backends", "zsq_deploy.calib", "zsq_deploy.demo", "zsq_deploy.device", "zsq_deploy.evaldata",
        "zsq_deploy.model",
        "zsq_deploy.quant", "zsq_deploy.recipe", "zsq_deploy.report", "zsq_deploy.verify",
    ),
    "zsq_deploy.doctor": ("zsq_deploy.backends", "zsq_deploy.verify"),
    "zsq_deploy.cli": (
        "zsq_deploy.backends", "zsq_deploy.calib", "zsq_deploy.device", "zsq_deploy.doctor", "zsq_deploy.model", "zsq_deploy.pipeline",
        "zsq_deploy.recipe", "zsq_deploy.report", "zsq_deploy.verify",
    ),
}  # fmt: skip


def part_of(name: str) -> str | None:
    return next((part for part in ARROWS if inside(name, part)), None)


def test_arrows_point_one_way():
    wrong = []
    for name, file in MODULES.items():
        part = part_of(name)
        if name == "zsq_deploy":
            continue
        assert part is not None, f"{name} belongs to no part: add it to ARROWS"
        for used in imports(file):
            other = part_of(used)
            if other is not None and other not in (part, *SHARED, *ARROWS[part]):
                wrong.append(f"{name} imports {used}")
    assert wrong == []


RUNTIMES = {"onnxruntime": "zsq_deploy.backends.onnxruntime", "openvino": "zsq_deploy.backends.openvino", "nncf": "zsq_deploy.backends.openvino", "tensorrt": "zsq_deploy.backends.tensorrt"}  # fmt: skip


ALONE = "zsq_deploy.device.agent"
"""A program of its own: on a device nothing of this package is there."""


def test_runtimes_stay_in_their_folders():
    wrong = [
        f"{name} imports {used}"
        for name, file in MODULES.items()
        if name != ALONE
        for used in imports(file)
        for runtime, home in RUNTIMES.items()
        if inside(used, runtime) and not inside(name, home)
    ]
    assert wrong == []


def test_backends_do_not_import_each_other():
    homes = {f"zsq_deploy.backends.{folder.name}" for folder in (ROOT / "backends").iterdir() if folder.is_dir()}
    wrong = []
    for name, file in MODULES.items():
        home = next((home for home in homes if inside(name, home)), None)
        if home:
            wrong += [
                f"{name} imports {used}" for used in imports(file) for other in homes - {home} if inside(used, other)
            ]
    assert wrong == []


def test_nothing_is_unpickled():
    """`torch.load` says weights_only=True, `numpy.load` says allow_pickle=False, and nobody unpickles by hand."""
    wrong = []
    for name, file in MODULES.items():
        unsafe = [used for used in imports(file) if used.partition(".")[0] in ("joblib", "dill", "marshal", "shelve")]
        wrong += [f"{name} imports {used}" for used in unsafe]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
                wrong.append(f"{name}:{node.lineno} {called}")
            if called == "torch.load" and keywords.get("weights_only") != "True":
                wrong.append(f"{name}:{node.lineno} torch.load without weights_only=True")
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
                wrong.append(f"{name}:{node.lineno} np.load without allow_pickle=False")
    assert wrong == []


_IMPORT_ALL = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
for name in {names!r}:
    importlib.import_module(name)
from zsq_deploy.backends import get_backend, target_names
from zsq_deploy.errors import UsageError
assert "ort-x86-vnni" in target_names()
try:
    get_backend("ort-x86-vnni")
except UsageError as error:
    assert "pip install 'zsq-deploy[onnxruntime]'" in str(error), error
else:
    raise AssertionError("a runtime that is not installed was found")
try:
    get_backend("openvino-cpu")
except UsageError as error:
    assert "pip install 'zsq-deploy[openvino]'" in str(error), error
else:
    raise AssertionError("a runtime that is not installed was found")
from zsq_deploy.doctor import examine
assert examine()["targets"]["ort-x86-vnni"]["builds"] is False
"""


def test_everything_else_works_without_the_runtimes():
    outside = [
        name
        for name in MODULES
        if not any(inside(name, home) for home in RUNTIMES.values()) or name.endswith(".targets")
    ]
    code = _IMPORT_ALL.format(blocked=[*RUNTIMES, "timm"], names=outside)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_starts_without_heavy_imports():
    """`zsq --help` answers at once: torch and the runtimes are imported when they are needed."""
    code = "import sys; from zsq_deploy.cli import main; main(['--help']); sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime', 'openvino', 'nncf', 'matplotlib')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, [line for line in done.stderr.splitlines() if line]


PRIVATE = re.compile(
    re.escape(f"{ROOT}/")
    + r"|/root/|/home/\w+/|hf_hub_download|snapshot_download|load_state_dict_from_url|torch\.hub|pretrained=True"
    r"|ghp_[A-Za-z0-9]{20}|BEGIN [A-Z ]*PRIVATE KEY"
)


def test_no_private_words():
    """No path of one machine and no download: everything here works anywhere, offline."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("this is no checkout")
    found = []
    for name in tracked.stdout.splitlines():
        file = ROOT / name
        if name == "tests/test_packaging.py" or not file.is_file() or file.suffix in (".png", ".npz", ".onnx", ".pb"):
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if PRIVATE.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []
