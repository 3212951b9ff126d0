"""docs/new_variant.md: its diffs apply to this repository, are short, and the tests that they bring pass.

python tests/lab/test_new_variant.py    # bring the places in its diffs up to date
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "new_variant.md").read_text(encoding="utf-8")
DIFFS = dict(zip(["lite_ppo", "maxrl"], re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL), strict=True))


def changed(diff: str) -> list[str]:
    return [line for line in diff.splitlines() if re.match(r"[+-](?!-- a/|\+\+ b/)", line)]


def hunks(diff: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """By file the hunks, each its old lines and its new ones."""
    found = {}
    for file in re.split(r"^--- a/.*\n\+\+\+ b/", diff, flags=re.MULTILINE)[1:]:
        name, _, body = file.partition("\n")
        bodies = [hunk.splitlines() for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]]
        found[name] = [tuple([line[1:] for line in hunk if line[0] != sign] for sign in "+-") for hunk in bodies]
    return found


def start(lines: list[str], old: list[str], name: str) -> int:
    """Index of a hunk's old lines, which must stand exactly once in the file."""
    places = [i for i in range(len(lines)) if lines[i : i + len(old)] == old]
    assert len(places) == 1, f"{name} has changed: bring docs/new_variant.md up to date:\n" + "\n".join(old)
    return places[0]


def apply(diff: str, root: Path) -> None:
    for name, parts in hunks(diff).items():
        lines = (root / name).read_text(encoding="utf-8").split("\n")
        for old, new in parts:
            at = start(lines, old, name)
            lines[at : at + len(old)] = new
        (root / name).write_text("\n".join(lines), encoding="utf-8")


def placed(page: str) -> str:
    """The page with the lines and the function of each hunk as git writes them."""

    def renewed(diff: str) -> str:
        waiting, said = hunks(diff), []
        for line in diff.splitlines():
            if line.startswith("+++ b/"):
                name, grown = line.removeprefix("+++ b/"), 0
                lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
            elif line.startswith("@@"):
                old, new = waiting[name].pop(0)
                at = start(lines, old, name)
                within = next((above[:80].rstrip() for above in lines[at - 1 :: -1] if re.match(r"[^\W\d]", above)), "")
                line = f"@@ -{at + 1},{len(old)} +{at + grown + 1},{len(new)} @@ {within}".rstrip()
                grown += len(new) - len(old)
            said.append(line)
        return "\n".join(said)

    return re.sub(r"(?<=```diff\n).*?(?=\n```)", lambda found: renewed(found[0]), page, flags=re.DOTALL)


def copy_to(folder: Path) -> Path:
    """The package and its tests, importable from the folder alone."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source, to in (("minirl", "minirl"), ("kernels", "minirl/kernels"), ("tests", "tests")):
        shutil.copytree(ROOT / source, folder / to, ignore=ignored)
    return folder


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_to(tmp_path)


TESTS = ("tests/engine/test_losses.py", "tests/engine/test_train.py", "tests/engine/test_advantages.py")
GENERAL = "rows_of_the_table or equals_its_definition or unscorable or share_one_signature"
FORKS = """
import json, os, sys
import hypothesis, pytest, torch, torch._dynamo  # once for all of the runs; minirl comes from the folder of each

def run(folder, words):
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return pytest.main(["-p", "no:cacheprovider", "-v", *words])

for folder, words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os._exit(run(folder, words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and output of pytest: in a copy with each variant, and in one that has the tests of maxrl alone."""
    folders = {name: copy_to(tmp_path_factory.mktemp(name)) for name in (*DIFFS, "tests alone")}
    for name, folder in folders.items():
        apply(DIFFS.get(name, DIFFS["maxrl"]), folder)
    for file in ("minirl/presets.py", "minirl/advantages.py"):
        shutil.copy(ROOT / file, folders["tests alone"] / file)
    jobs = [(str(folders[name]), [*TESTS, "-k", f"{name} or {GENERAL}"]) for name in DIFFS]
    jobs += [(str(folders["tests alone"]), [TESTS[0], "-k", "rows_of_the_table"])]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(jobs)], env=environment, capture_output=True, text=True, check=True
    )
    said = [(folder / "log").read_text(encoding="utf-8") for folder in folders.values()]
    return dict(zip(folders, zip(map(int, done.stdout.split()), said, strict=True), strict=True))


@pytest.mark.parametrize("name", DIFFS)
def test_a_variant_of_the_page_is_short_and_its_tests_pass(name, runs):
    assert 2 <= len(changed(DIFFS[name])) <= 15
    code, said = runs[name]
    assert code == 0, said
    passed = set(re.findall(r"::(\S+) PASSED", said))
    mine = {f"test_every_preset_{what}[{name}]" for what in ("trains_towards_tokens_with_positive_advantage",)}
    mine |= {f"test_every_preset_takes_a_step[{name}]", "test_presets_are_the_rows_of_the_table"}
    if name == "maxrl":
        mine |= {"test_every_estimator_equals_its_definition_group_by_group"}
        mine |= {"test_estimators_do_not_depend_on_the_order_of_rows[maxrl]"}
    assert mine <= passed


def test_the_tests_of_a_variant_fail_without_its_code(runs):
    """The copy is what they run, not the installed package, and they do look at the row."""
    code, said = runs["tests alone"]
    assert code == 1, said
    assert "Right contains 1 more item:\nE         {'maxrl': " in said


def test_the_page_gives_the_advantages_that_its_code_gives(copy):
    apply(DIFFS["maxrl"], copy)
    spec = importlib.util.spec_from_file_location("advantages_with_maxrl", copy / "minirl" / "advantages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for right, wanted in ((1, 7.0), (7, 1 / 7)):
        A = module.maxrl(torch.tensor([1.0] * right + [0.0] * (8 - right)), torch.zeros(8, dtype=torch.long), eps=0)
        assert A[[0, -1]].tolist() == pytest.approx([wanted, -1.0], abs=1e-6)
    assert "1 right answer of 8: A = 7 for it, −1 for the others;  7 of 8: 1/7 and −1" in PAGE
    assert f"\n{len(changed(DIFFS['maxrl']))} changed lines" in PAGE


def test_the_places_in_the_diffs_are_up_to_date():
    assert placed(PAGE) == PAGE, "run python tests/lab/test_new_variant.py"
    assert placed(PAGE.replace("@@ -", "@@ -1")) == PAGE


def test_the_diffs_apply_with_git_too_and_one_after_the_other(copy):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for diff in DIFFS.values():
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
        done = subprocess.run(
            ["git", "apply", "-"], cwd=copy, env=environment, input=diff, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    presets = (copy / "minirl" / "presets.py").read_text(encoding="utf-8")
    assert '"lite_ppo": {' in presets and '"maxrl": {' in presets


if __name__ == "__main__":
    (ROOT / "docs" / "new_variant.md").write_text(placed(PAGE), encoding="utf-8")
