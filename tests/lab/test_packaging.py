"""The wheel that a user installs: all of the code, nothing else, and usable away from the repository."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

import pytest
from conftest import misfit

import minirl

ROOT = Path(__file__).parents[2]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "minirl", "kernels")


def run(*command, cwd: Path, **environment) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no stale build folder of the repository gets in and none is left there."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    for name in ("minirl/notes.txt", "tests/__init__.py", "bench/__init__.py"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).touch()
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", output, ".")
    run(*pip, cwd=source)
    (built,) = output.glob("*.whl")
    return built


def source_files() -> dict[str, bytes]:
    """Name in the wheel to content: `kernels/` stands as `minirl/kernels/`."""
    engine = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "minirl").rglob("*.py")}
    engine["minirl/py.typed"] = ROOT / "minirl" / "py.typed"
    kernels = {"minirl/" + path.relative_to(ROOT).as_posix(): path for path in (ROOT / "kernels").rglob("*.py")}
    return {name: path.read_bytes() for name, path in {**engine, **kernels}.items()}


def test_the_wheel_holds_every_module_and_no_other_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        code = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert code == source_files()
    assert "minirl/kernels/__init__.py" in code


def test_the_wheel_is_for_every_platform_and_carries_the_licence(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_engine_requires_five_packages_and_the_rest_is_optional(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        requirements = message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    plain = {r.split(">")[0].split(";")[0].strip() for r in requirements if "extra ==" not in r}
    assert plain == {"torch", "triton", "safetensors", "tokenizers", "numpy"}


def test_the_wheel_has_the_version_of_the_package(wheel):
    assert wheel.name.startswith(f"minirl-{minirl.__version__}-")


@pytest.mark.parametrize(
    ("triton", "numpy", "fits"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.0", "2.4.0", True), ("3.9.0+git1", "2.10.1", True)],
)
def test_an_interpreter_that_fails_with_its_numpy_is_said_before_the_tests(triton, numpy, fits):
    sentence = misfit(triton, numpy)
    assert (sentence == "") == fits
    assert fits or "pip install 'numpy<2.4'" in sentence


def test_an_installed_wheel_works_away_from_the_repository(wheel, tmp_path):
    target = tmp_path / "installed"
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    run(*install, cwd=tmp_path)
    script = "import minirl.kernels, minirl.tokenizer as t; print(minirl.__file__, minirl.kernels.__file__, t.__file__)"
    files = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert len(files) == 3 and all(Path(file).is_relative_to(target) for file in files)
    script = "from importlib.metadata import distribution as d; print(*[e.value for e in d('minirl').entry_points])"
    assert run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target)).strip() == "minirl.__main__:main"


def test_every_public_name_is_found_and_importing_the_package_loads_nothing_heavy():
    shown = ast.parse((ROOT / "minirl" / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(shown) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"import_module", "TYPE_CHECKING"} == set(minirl.__all__) <= set(dir(minirl))
    for name in minirl.__all__:
        assert getattr(minirl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        minirl.Trainer  # noqa: B018
    script = "import sys, minirl; print(*{'torch', 'numpy', 'minirl.model', 'minirl.errors'} & sys.modules.keys())"
    assert run(sys.executable, "-c", script, cwd=ROOT).split() == []


def test_an_editable_install_reads_the_kernels_from_their_folder():
    """What `make` sets up: both names lead to this repository, from any folder."""
    origin = json.loads(distribution("minirl").read_text("direct_url.json") or "{}")
    if origin.get("dir_info") != {"editable": True} or origin["url"] != ROOT.as_uri():
        pytest.skip(f"minirl is not installed with `pip install -e {ROOT}`")
    script = "import minirl.kernels as k, minirl; print(minirl.__file__); print(k.__file__)"
    files = run(sys.executable, "-c", script, cwd=Path("/")).splitlines()
    assert files == [str(ROOT / "minirl" / "__init__.py"), str(ROOT / "kernels" / "__init__.py")]
