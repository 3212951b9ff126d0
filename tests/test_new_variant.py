"""docs/new_variant.md: its diffs apply to this repository, are short, and the tests that they bring pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_variant.md").read_text(encoding="utf-8")
DIFFS = dict(zip(["lite_ppo", "maxrl"], re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL), strict=True))


def changed(diff: str) -> list[str]:
    return [line for line in diff.splitlines() if re.match(r"[+-](?!-- a/|\+\+ b/)", line)]


def apply(diff: str, root: Path) -> None:
    """Each hunk's old lines must stand exactly once in its file."""
    for file in re.split(r"^--- a/.*\n\+\+\+ b/", diff, flags=re.MULTILINE)[1:]:
        name, _, body = file.partition("\n")
        text = (root / name).read_text(encoding="utf-8")
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = [(line[:1], line[1:] + "\n") for line in hunk.splitlines()]
            old = "".join(line for sign, line in lines if sign != "+")
            assert text.count(old) == 1, f"{name} has changed: bring the diff of docs/new_variant.md up to date:\n{old}"
            text = text.replace(old, "".join(line for sign, line in lines if sign != "-"))
        (root / name).write_text(text, encoding="utf-8")


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package and its tests, importable from the folder alone."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder, to in (("minirl", "minirl"), ("kernels", "minirl/kernels"), ("tests", "tests")):
        shutil.copytree(ROOT / folder, tmp_path / to, ignore=ignored)
    return tmp_path


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


TESTS = ("tests/test_losses.py", "tests/test_train.py", "tests/test_advantages.py")
GENERAL = "rows_of_the_table or equals_its_definition or unscorable or share_one_signature"


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_of_the_page_is_short_and_its_tests_pass(name, copy):
    assert 2 <= len(changed(DIFFS[name])) <= 15
    apply(DIFFS[name], copy)
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-v", *TESTS, "-k", f"{name} or {GENERAL}", cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"::(\S+) PASSED", done.stdout))
    mine = {f"test_every_preset_{what}[{name}]" for what in ("trains_towards_tokens_with_positive_advantage",)}
    mine |= {f"test_every_preset_takes_a_step[{name}]", "test_presets_are_the_rows_of_the_table"}
    if name == "maxrl":
        mine |= {"test_every_estimator_equals_its_definition_group_by_group"}
        mine |= {"test_estimators_do_not_depend_on_the_order_of_rows[maxrl]"}
    assert mine <= passed


def test_the_tests_of_a_variant_fail_without_its_code(copy):
    """The copy is what they run, not the installed package, and they do look at the row."""
    kept = {name: (copy / name).read_bytes() for name in ("minirl/losses.py", "minirl/advantages.py")}
    apply(DIFFS["maxrl"], copy)
    for name, content in kept.items():
        (copy / name).write_bytes(content)
    done = python("-m", "pytest", "-p", "no:cacheprovider", "tests/test_losses.py", "-k", "rows_of_the_table", cwd=copy)
    assert done.returncode == 1
    assert "Right contains 1 more item:\nE         {'maxrl': " in done.stdout


def test_the_page_gives_the_advantages_that_its_code_gives(copy):
    apply(DIFFS["maxrl"], copy)
    lines = (
        "import torch",
        "from minirl.advantages import maxrl",
        "for right in (1, 7):",
        "    A = maxrl(torch.tensor([1.0] * right + [0.0] * (8 - right)), torch.zeros(8, dtype=torch.long), eps=0)",
        "    print(round(A[0].item(), 6), round(A[-1].item(), 6))",
    )
    assert python("-c", "\n".join(lines), cwd=copy).stdout.split() == ["7.0", "-1.0", str(round(1 / 7, 6)), "-1.0"]
    assert "1 right answer of 8: A = 7 for it, −1 for the others;  7 of 8: 1/7 and −1" in PAGE
    assert f"\n{len(changed(DIFFS['maxrl']))} changed lines" in PAGE


def test_the_diffs_apply_with_git_too_and_one_after_the_other(copy):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for diff in DIFFS.values():
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
        done = subprocess.run(
            ["git", "apply", "-"], cwd=copy, env=environment, input=diff, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    losses = (copy / "minirl" / "losses.py").read_text(encoding="utf-8")
    assert '"lite_ppo": Preset' in losses and '"maxrl": Preset' in losses
