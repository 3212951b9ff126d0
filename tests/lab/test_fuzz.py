"""A short form of tests/fuzz.py, whose full run takes many minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz.py"


@pytest.mark.parametrize("seed", [1])
def test_mutated_files_and_arguments_end_in_one_sentence(seed):
    args = ["--count", "24", "--seed", str(seed), "--quick", "--jobs", "1", "--kinds", "model,data,arguments"]
    done = subprocess.run([sys.executable, FUZZ, *args], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 cases" in done.stdout and "exit code 2" in done.stdout
