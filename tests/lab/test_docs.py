"""README and docs: their commands and snippets run, their links and names lead somewhere, and their counts are true."""

import json
import re
import shlex
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from code_lines import COUNTED, counted_anew

from minirl import PRESETS, InputError, ModelConfig, Tokenizer, Transformer
from minirl.lab import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEW = {"maxrl": "grpo"}  # a preset that a page adds, and one that takes the same options
CHEAP = {
    "grpo": shlex.split("--steps 1 --prompts 2 --group 2 --max-tokens 4 --eval-prompts 2 --eval-samples 2"),
    "eval": shlex.split("--prompts 2 --samples 2 --max-tokens 4"),
    "generate": shlex.split("--max-tokens 4"),
}


def fences(page: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(TEXTS[page]) if kind == language]


def commands(page: str) -> list[list[str]]:
    """The words of each `minirl ...` in the page's fences, without `minirl`."""
    lines = [line.removeprefix("$ ") for body in fences(page, "") for line in body.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("minirl ")]
    return [[NEW.get(word, word) for word in words] for words in found]


def fill(folder: Path) -> None:
    """Give a folder what the pages name: a model, data and rewards."""
    tokenizer, to = Tokenizer.from_chars(string.printable), folder / "models" / "smollm2"
    sizes = {"width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48, "max_positions": 512}
    Transformer(ModelConfig(tokenizer.vocab_size, **sizes)).initialise(0).save_pretrained(to)
    tokenizer.save_pretrained(to)
    config = json.loads((to / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (to / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    problems = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(20)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    rewards = next(body for body in fences("docs/rewards_and_judge.md", "python") if body.startswith("def polite"))
    (folder / "my_rewards.py").write_text(rewards, encoding="utf-8")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    fill(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in TEXTS if commands(page)])
def test_every_command_has_the_options_that_a_page_gives_it(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for words in commands(page):
        name, *args = words[words[0] == "check" :]
        if "--resume" not in args:  # its options are those of the run
            assert cli.parse(name, args)


def test_options_in_the_text_are_those_of_a_command():
    known = {flag for kind, _ in cli.COMMANDS.values() for flag in cli._options(kind)} | {"--help", "--version"}
    named = {flag for text in TEXTS.values() for flag in re.findall(r"(?<=`)--[a-z][\w-]*(?:\.[a-z][\w-]*)?", text)}
    assert {"--loss.eps-high", "--resume", "--overlong-prompts"} <= named
    assert {flag for flag in named if flag.split(".")[0] != "--template"} <= known


def test_the_commands_of_the_readme_run_one_after_the_other(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    for words in commands("README.md"):
        resumed = "--resume" in words
        cli.main([*words, *([] if resumed else CHEAP[words[words[0] == "check"]])])
    said = capsys.readouterr().out
    assert (workspace / "runs/mine/report.html").exists() and "step 1/1" in said
    assert len(re.findall(r"^'What is 3 \+ 4\?'", said, re.MULTILINE)) == 4


def names_of(page: str) -> dict:
    """What a page's snippets take as given: here what a trainer on a transformers model holds."""
    if page != "docs/kernels.md":
        return {}
    head, hidden = torch.nn.Linear(8, 11, bias=False), torch.randn(2, 5, 8, requires_grad=True)
    model = SimpleNamespace(model=lambda ids: SimpleNamespace(last_hidden_state=hidden), lm_head=head)
    grid = {name: torch.randn(2, 4) for name in ("advantages", "old", "ref")}
    return {
        "model": model,
        "ids": torch.randint(11, (2, 5)),
        "mask": torch.tensor([[True, True, False, False], [False, True, True, True]]),
        "advantages": grid["advantages"],
        "old_logp": -torch.rand(5),
        "ref_logp": -torch.rand(5),
    }


@pytest.mark.parametrize("page", [page for page in TEXTS if fences(page, "python")])
def test_the_snippets_of_a_page_run_in_their_order(page, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    names = names_of(page)
    for body in fences(page, "python"):
        exec(compile(body.replace("range(30)", "range(2)").replace("steps=20", "steps=1"), page, "exec"), names)
    if page == "README.md":
        assert len(names["rows"]) == 128 and (workspace / "runs/loop/model.safetensors").exists()


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links_files_and_targets_exist(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", TEXTS[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text(encoding="utf-8")), f"{link}#{anchor}"
    files = re.findall(r"(?<![\w/.-])((?:minirl|kernels|tests|examples|bench|docs)/[\w./]+\w)", TEXTS[page])
    files += [f"bench/{name}.py" for name in re.findall(r"python -m bench\.(\w+)", TEXTS[page])]
    assert [file for file in files if not (ROOT / file).exists()] == []
    there = {file.name for folder in ("minirl", "kernels", "tests", "bench") for file in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", TEXTS[page])) - {"my_rewards.py"} <= there
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    made = re.findall(r"(?:`|^\$ )make ([a-z-]+)", TEXTS[page], re.MULTILINE)
    assert [target for target in made if f"\n{target}:" not in makefile] == []


def test_the_map_names_every_file_of_the_engine():
    files = [file.name for file in (ROOT / "minirl").glob("*.py") if not file.name.startswith("__")]
    assert files and not [name for name in files if f"`{name}`" not in TEXTS["CONTRIBUTING.md"]]


def test_the_readme_is_short_and_counts_the_lines_of_the_files_to_read():
    assert len(TEXTS["README.md"].splitlines()) <= 160
    assert len(COUNTED.findall(TEXTS["README.md"])) >= 8
    assert counted_anew(TEXTS["README.md"]) == TEXTS["README.md"], "run python tests/code_lines.py README.md"


def test_the_table_of_presets_has_each_with_its_updates():
    rows = re.findall(r"^\| `([^`]+)`(?: \(`minirl (\w+)`\))? \|.* (\d+) \|$", TEXTS["README.md"], re.MULTILINE)
    assert {name for name, _, _ in rows} == set(PRESETS)
    for name, command, updates in rows:
        config = cli.parse(command or "grpo", ["--model", "model", "--preset", name])
        assert config.epochs * config.mini_batches == int(updates), name


def test_a_command_that_does_not_fit_would_be_found(workspace, monkeypatch):
    monkeypatch.setitem(TEXTS, "README.md", "```\n$ minirl grpo --model m --stpes 3   # a comment\n```\n")
    [[name, *args]] = commands("README.md")
    with pytest.raises(InputError, match="no option '--stpes'"):
        cli.parse(name, args)
