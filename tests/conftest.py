"""Shared by every test: one thread a process, one hypothesis profile, and the golden numbers."""

import importlib.metadata
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch is imported, and for the processes that tests start too: the sizes are small, and several processes that
# each spread over all cores wait for one another. An OMP_NUM_THREADS of the caller stands.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy
import pytest
import torch

# What several rooms share is imported by name, from wherever the tests lie.
HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, *HERE.iterdir()) if folder.is_dir()]

# Triton reads this when a kernel is defined: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: first calls pay for compiling and cold caches. Fresh examples on every run: a failure prints its own.
hypothesis.settings.register_profile("minirl", deadline=None, derandomize=False)
hypothesis.settings.load_profile("minirl")


def misfit(triton: str, numpy: str) -> str:
    """Why two versions cannot run the kernels in Triton's interpreter; empty where they can."""
    old, new = tuple(map(int, triton.split(".")[:2])) < (3, 7), tuple(map(int, numpy.split(".")[:2])) >= (2, 4)
    advice = f"Triton {triton} interprets kernels with numpy below 2.4 only, and this is {numpy}"
    return f"{advice}: pip install 'numpy<2.4', or a newer Triton" if old and new else ""


def pytest_configure() -> None:
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    if sentence := misfit(importlib.metadata.version("triton"), numpy.__version__):
        raise pytest.UsageError(sentence)


@pytest.fixture(scope="session")
def golden() -> dict:
    """Numbers worked out independently of this code, by name of the formula."""
    return json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny model that reads and writes sums, to be left as it is."""
    from helpers import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def complaint(capsys, monkeypatch) -> Callable[..., str]:
    """Run a command that must fail with exit code 2, and return the one sentence that it says on stderr.

    It may leave nothing behind but what `left` names, with the folders that hold it.
    """
    from helpers import all_files, sentence

    from minirl.lab import cli, display

    def run(*args: str, left: Sequence[str] = ()) -> str:
        before = set(all_files())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(args))
        assert stop.value.code == 2
        allowed = {place for name in left for place in (Path(name), *Path(name).parents)}
        assert before <= set(all_files()) <= before | allowed
        assert all(Path(name).exists() for name in left)
        return sentence(capsys.readouterr().err)

    monkeypatch.setattr(display, "PATIENCE", math.inf)  # no line of progress on stderr, however slow the machine is
    return run
