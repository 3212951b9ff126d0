"""Every kernel compiles for GPUs that are not here: without spills, with 16-byte loads in sweeps over rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = {80, 90, 100}

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    """Read what `python -m bench compile --quick` wrote: sm_90 in all forms, the others in one. It runs in its own
    process, because kernels of this one may be interpreted."""
    folder = tmp_path_factory.mktemp("compile")
    command = [sys.executable, "-m", "bench", "compile", "--quick", "--device", "cpu", "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "compile.json").is_file(), done.stdout + done.stderr
    return json.loads((folder / "compile.json").read_text()) | {"status": done.returncode, "output": done.stdout}


def test_every_kernel_is_compiled_for_every_target(table):
    assert len(table["kernels"]) >= 5
    compiled = {(row["kernel"], row["target"]) for row in table["rows"]}
    assert compiled == {(kernel, target) for kernel in table["kernels"] for target in TARGETS}


def test_no_kernel_spills(table):
    spilling = [(r["kernel"], r["use"], r["target"], r["spills"], r["stack"]) for r in table["rows"] if r["spills"]]
    assert not spilling
    assert all(row["stack"] == 0 and 0 < row["registers"] <= 255 for row in table["rows"])


def test_sweeps_over_rows_load_16_bytes_at_a_time(table):
    sweeps = [row for row in table["rows"] if row["sweep"]]
    assert {"_stats_kernel", "_gradient_kernel", "_fused_kernel"} <= {row["kernel"] for row in sweeps}
    assert [(r["kernel"], r["use"], r["target"]) for r in sweeps if r["widest_load"] < 16] == []


def test_the_suite_prints_a_line_a_kernel_and_fails_where_a_rule_is_broken(table):
    assert table["status"] == bool(table["failures"])
    assert all(f"sm_{target}" in table["output"] for target in TARGETS)
    for row in table["rows"]:
        assert row["kernel"] in table["output"] and row["use"] in table["output"]
