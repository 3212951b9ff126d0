"""The attacks of escapes.toml, as root and as an ordinary user: none escapes, none is paid, none goes unjudged, and
nothing of them is left; the same where a machine has no mounts for the worker."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases import read_cases

CASES = read_cases("escapes")
KINDS = [kind + mounts for kind in ("root", "user") for mounts in ("", ", no mounts")]


@pytest.fixture(scope="module", params=KINDS)
def report(request):
    if request.param.startswith("root") and os.getuid():
        pytest.skip("this is no root")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        program = [sys.executable, str(Path(__file__).with_name("escapes.py")), request.param, folder]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
        if "cannot show Python" in done.stderr:
            pytest.skip("root may not make the mounts by which other users would see Python")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"kind": request.param}


def test_no_attack_escapes_is_paid_or_goes_unjudged(report):
    assert ("user" in report["walls"]) == report["kind"].startswith("root")
    assert "mounts" not in report["walls"] or "no mounts" not in report["kind"]
    for name in ("honest", "honest, in a function"):
        assert report["outcomes"].pop(name) == {"passed": True, "why": ""}
    for name, outcome in report["outcomes"].items():
        if name in CASES["hidden"] and "mounts" not in report["walls"]:
            continue
        if name.startswith("calls "):
            why = outcome if isinstance(outcome, str) else outcome["why"]
            assert why in ("the program raised Exception: won: []", "ChildError: Exception: won: []"), why
        if isinstance(outcome, dict):
            assert not outcome["passed"] and "at_fault" not in outcome, (name, outcome)
        else:
            assert outcome.startswith(("ChildError: ", "TimeoutError: ")), (name, outcome)
            assert "its worker failed" not in outcome and outcome != "ChildError: its process died", (name, outcome)


def test_no_attack_harms_anybody(report):
    assert report["harm"] == []


def test_there_are_many_attacks():
    assert sum(map(len, CASES.values())) >= 180
