"""Short forms of two harnesses: runs that are killed, and runs whose checkpoints and logs are damaged, go on as whole
ones, or say in a sentence why not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="they watch processes as Linux shows them")


def harness(name: str, work: Path, *options: str) -> str:
    """Run a harness in a process of its own, whose threads and instruction sets it fixes; return its table."""
    words = [sys.executable, str(TESTS / f"{name}.py"), "--short", "--work", str(work), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@linux
def test_killed_runs_resume_to_the_same_bits_and_leave_nothing(tmp_path):
    table = harness("kills", tmp_path, "--kills", "6", "--runs", "4")
    runs, kills = map(int, re.search(r"^all +(\d+) +(\d+)", table, re.M).groups())
    assert runs >= 4 and kills >= 6, table


@linux
def test_a_damaged_checkpoint_or_log_is_never_gone_on_from_without_a_word(tmp_path):
    """The older checkpoint is gone on from, a sentence says why none is, or the damage is what a kill may leave."""
    table = harness("damages", tmp_path, "--all")
    assert int(re.search(r"^all +(\d+)", table, re.M)[1]) >= 12 and "?" not in re.sub(r"other\?", "", table), table
