"""The commands. Each is a config dataclass, whose field docstrings are its --help, and a function that takes it.

Whatever a user can get wrong ends in one sentence on stderr and exit code 2; Ctrl-C saves and ends with 130.
"""

import contextlib
import errno
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from minirl.demo import DemoConfig, run_demo
from minirl.display import RichDisplay, table
from minirl.errors import InputError
from minirl.evaluate import evaluate
from minirl.files import read_json
from minirl.report import plot, read_metrics, report
from minirl.rewards.registry import did_you_mean
from minirl.rollout import completion_text
from minirl.sampler import Sampler, SamplingParams
from minirl.tasks import parse_task
from minirl.train import grpo as grpo_module
from minirl.train import ppo as ppo_module
from minirl.train.grpo import GRPOConfig, train_grpo
from minirl.train.outcomes import OutcomesConfig, write_outcomes
from minirl.train.ppo import PPOConfig, train_ppo
from minirl.train.prefer import PreferConfig, train_prefer
from minirl.train.reward import RewardConfig, train_reward
from minirl.train.rft import RFTConfig, train_rft
from minirl.train.run import (
    load,
    refuse_below_one,
    refuse_negative,
    refuse_not_positive,
    refuse_unknown_choices,
)
from minirl.train.sft import SFTConfig, train_sft


@dataclass(frozen=True)
class GenerateConfig:
    """Complete prompts with a checkpoint."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    prompts: tuple[str, ...]
    """Prompts; a checkpoint with a chat template takes each as a user message."""
    raw: bool = False
    """Continue the text as it stands, without the chat template."""
    n: int = 1
    """Completions a prompt."""
    max_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the largest probability."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; what is printed ends before them."""
    seed: int = 0
    """Same seed, same completions."""
    slots: int = 64
    """Completions at a time."""
    json: bool = False
    """Print one JSON object a completion, with tokens and log-probs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self):
        refuse_unknown_choices(self)
        refuse_below_one(self, "slots")
        if not self.prompts:
            raise InputError("--prompts is empty: give at least one")


@dataclass(frozen=True)
class EvalConfig:
    """Accuracy of a checkpoint on a task's held-out problems: greedy, mean@k, pass@k and maj@k with 95 % intervals."""

    model: str
    """Checkpoint: a Hugging Face directory or hub id."""
    task: str = "arithmetic"
    """arithmetic, countdown or a .jsonl file, with options after a colon: arithmetic:op=product,digits=2"""
    prompts: int = 256
    """Held-out prompts, at most."""
    samples: int = 8
    """Completions a prompt (k)."""
    max_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Of the k samples; the greedy completion comes on top."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; the checker sees what comes before them."""
    reward_timeout: float | None = None
    """Seconds a completion that the checker may take, in a process that can be killed; longer is without a score."""
    shown: int = 4
    """Completions to print."""
    seed: int = 0
    """Same seed, same completions."""
    slots: int = 64
    """Completions at a time."""
    json: bool = False
    """Print the numbers as one JSON object."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in."""
    device: str = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self):
        refuse_unknown_choices(self)
        refuse_below_one(self, "prompts", "samples", "slots")
        refuse_negative(self, "shown")
        if self.reward_timeout is not None:
            refuse_not_positive(self, "reward_timeout")


@dataclass(frozen=True)
class ReportConfig:
    """Draw a run: plot.png and report.html in its folder."""

    run: str
    """Folder of the run."""


def generate(c: GenerateConfig) -> None:
    model, tokenizer = load(c.model, c.dtype, c.device)
    params = SamplingParams(
        c.n, c.temperature, c.top_k, c.top_p, c.min_p, c.max_tokens, tokenizer.stop_ids, c.stop, c.seed
    )
    chat = tokenizer.chat_template is not None and not c.raw
    ids = [tokenizer.prompt_ids([{"role": "user", "content": p}] if chat else p) for p in c.prompts]
    with RichDisplay() as display:
        groups = Sampler(model, c.slots, tokenizer=tokenizer).generate(
            ids, params, lambda done, total: display.progress("completions", done, total)
        )
    for prompt, group in zip(c.prompts, groups, strict=True):
        for completion in group:
            text = completion_text(tokenizer, completion, params)
            if c.json:
                record = {"prompt": prompt, "text": text, "finish_reason": completion.finish_reason}
                print(json.dumps(record | {"tokens": completion.tokens, "logprobs": completion.logprobs}))
            else:  # the display lets no escape code of a completion through to the terminal
                display.line(f"{prompt!r} [{len(completion.tokens)} tokens, {completion.finish_reason}]\n{text}\n")


def evaluation(c: EvalConfig) -> None:
    task = parse_task(c.task)
    model, tokenizer = load(c.model, c.dtype, c.device)
    params = SamplingParams(
        c.samples,
        c.temperature,
        top_p=c.top_p,
        max_tokens=c.max_tokens,
        stop_ids=tokenizer.stop_ids,
        stop=c.stop,
        seed=c.seed,
    )
    sampler = Sampler(model, c.slots, tokenizer=tokenizer)
    with RichDisplay() as display:
        result = evaluate(
            sampler,
            tokenizer,
            task,
            params,
            task.heldout[: c.prompts],
            timeout=c.reward_timeout,
            progress=lambda done, total: display.progress("evaluation", done, total),
        )
    if c.json:
        print(json.dumps({"metrics": result.metrics, "intervals": result.intervals}))
        return
    rows = [
        (name.removeprefix("eval/"), f"{result.metrics[name]:.3f}", f"{low:.3f} to {high:.3f}")
        for name, (low, high) in result.intervals.items()
    ]
    table(
        f"{task.name}: {len(result.correct)} held-out prompts, k = {c.samples}, T = {c.temperature:g}",
        ("accuracy", "value", "95 % interval"),
        rows,
    )
    for line in result.rollout.late_lines(c.reward_timeout).values():
        display.line(line)
    for i in range(min(c.shown, len(result.correct))):
        j = i * c.samples
        first = result.correct[i][0]
        mark = "right" if first == 1 else "unscored" if np.isnan(first) else "wrong"
        display.line(f"\n{_prompt_text(result.rollout.examples[i]['prompt'])}\n[{mark}] {result.rollout.texts[j]}")


def _prompt_text(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def training(train: Callable) -> Callable:
    """The command of a run that trains: do it, then draw it."""

    def command(config) -> None:
        with RichDisplay() as display:
            model = train(config, display)
        print(f"model:  {model}")
        draw(ReportConfig(config.out))

    return command


def outcomes(config: OutcomesConfig) -> None:
    with RichDisplay() as display:
        files = write_outcomes(config, display)
    for file in files:
        print(f"{file.stem + ':':8} {file}")


def demo(config: DemoConfig) -> None:
    out = Path(config.out)
    for seed in config.seeds:  # the demo owns its folders; nothing else in `out` is touched
        shutil.rmtree(out / f"seed-{seed}", ignore_errors=True)
    with RichDisplay() as display:
        runs = [run_demo(config, seed, display)[1] for seed in config.seeds]
    rows = []
    for seed, run in zip(config.seeds, runs, strict=True):
        metrics = [m for m in read_metrics(run) if m.get("eval/mean") is not None]
        before, after = metrics[0], metrics[-1]
        pairs = ((f"{before[k]:.3f}", f"{after[k]:.3f}") for k in ("eval/mean", "eval/greedy", "eval/pass@8"))
        rows.append((str(seed), *(value for pair in pairs for value in pair)))
    columns = (
        "seed",
        "mean@8 after SFT",
        "after GRPO",
        "greedy after SFT",
        "after GRPO",
        "pass@8 after SFT",
        "after GRPO",
    )
    table("held-out accuracy on sums of two numbers below 100", columns, rows)
    for line in _last_completions(runs[0]):
        display.line(line)
    png = plot(runs, out / "demo.png", [f"seed {seed}" for seed in config.seeds])
    print(f"curves: {png}\nmodel:  {runs[0] / 'model'}")


def _last_completions(run: Path, count: int = 6) -> list[str]:
    lines = (run / "completions.jsonl").read_bytes().split(b"\n")[:-1]  # not splitlines: a text may hold other ends
    records = [json.loads(line) for line in (*lines[: count // 2], *lines[-count // 2 :])]
    return [
        f"step {r['step']:>3}: {_prompt_text(r['prompt'])} {r['completion']}  (reward {r['reward']:g})" for r in records
    ]


def draw(c: ReportConfig) -> None:
    folder = Path(c.run)
    print(f"plot:   {plot([folder], folder / 'plot.png')}\nreport: {report(folder)}")


COMMANDS: dict[str, tuple[type, Callable]] = {
    "demo": (DemoConfig, demo),
    "generate": (GenerateConfig, generate),
    "eval": (EvalConfig, evaluation),
    "sft": (SFTConfig, training(train_sft)),
    "rft": (RFTConfig, training(train_rft)),
    "prefer": (PreferConfig, training(train_prefer)),
    "outcomes": (OutcomesConfig, outcomes),
    "reward": (RewardConfig, training(train_reward)),
    "grpo": (GRPOConfig, training(train_grpo)),
    "ppo": (PPOConfig, training(train_ppo)),
    "report": (ReportConfig, draw),
}


def usage() -> str:
    lines = [f"  {name:9} {config.__doc__.splitlines()[0]}" for name, (config, _) in COMMANDS.items()]
    return (
        "usage: minirl COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nminirl COMMAND --help shows the options of one."
    )


def parse(name: str, args: Sequence[str]):
    """The config of a command from its arguments; an InputError names what does not fit."""
    kind, _ = COMMANDS[name]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                kind, prog=f"minirl {name}", args=list(args), default=_defaults(kind, args), return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _first_sentence(complaint.getvalue()).removeprefix("value error: ")
        ours = re.match(r"Error parsing \w+: (.*)", text)  # from a config's __post_init__
        raise InputError(ours[1] if ours else f"{text}: see minirl {name} --help") from None
    if unknown:
        hint = did_you_mean(unknown[0], _options(kind))
        raise InputError(f"minirl {name} has no option {unknown[0]!r}{hint}: see minirl {name} --help")
    return config


def _options(kind: type, prefix: str = "--") -> list[str]:
    names = []
    for f in fields(kind):
        flag = prefix + f.name.replace("_", "-")
        names += _options(f.type, flag + ".") if is_dataclass(f.type) else [flag]
    return names


def _first_sentence(box: str) -> str:
    """tyro's complaint is a box with a title, drawn in ASCII where stdout is; its content, on one line."""
    lines = [line.strip(" │") for line in box.splitlines()]
    title = lines[0].strip("╭─╮ ") if lines else "bad arguments"
    content = []
    for line in lines[1:]:
        if not re.fullmatch(r"[-─╰╯ ]*", line):
            content.append(line)
        elif content:
            break
    text = " ".join(content) or title
    return f"{title.lower()}: {text.removesuffix('.')}" if title.lower() not in text.lower() else text.removesuffix(".")


def _defaults(kind: type, args: Sequence[str]):
    """Defaults that depend on other options: those of a preset, and those of the run that is resumed."""
    names = [f.name for f in fields(kind)]
    if any(arg.partition("=")[0] == "--resume" for arg in args) and "resume" in names:
        out = Path(_value(args, "--out") or kind.out)
        if not (out / "config.json").exists():
            raise InputError(f"{out} holds no run to resume: check --out, or leave --resume away")
        return _from_json(kind, read_json(out / "config.json"), str(out))
    presets = {GRPOConfig: grpo_module.preset_defaults, PPOConfig: ppo_module.preset_defaults}
    preset = _value(args, "--preset") if kind in presets else None
    if preset and preset.lower() != "none":
        budget = _value(args, "--max-tokens")
        chosen = presets[kind](preset, int(budget) if budget and budget.isdigit() else kind.max_tokens)
        return kind(model=tyro.MISSING, **chosen)
    return None


def _value(args: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, with dashes or underscores, as `--flag value` or `--flag=value`."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else args[i + 1] if i + 1 < len(args) else None
    return found


def _from_json(kind: type, content: dict, out: str):
    """A config dataclass from the run folder's config.json."""
    known = {f.name: f for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name == "data_hash":  # no option
            continue
        if name not in known:
            raise InputError(
                f"{out}/config.json: the key {name!r} is not one of this command's: was this another command's run?"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        for name in values:
            if is_dataclass(known[name].type):
                values[name] = known[name].type(**values[name])
        return kind(**values, out=out)
    except TypeError as error:
        raise InputError(f"{out}/config.json is not as this command wrote it ({error}): restore it") from None


def main(argv: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a completion may hold what the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _dispatch(args)
    except InputError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if _is_out_of_memory(error):
            _fail(_out_of_memory(args[0]))
        if not isinstance(error, OSError):
            raise
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
        _fail(f"the system refused ({what}): check path, permissions and free space; earlier checkpoints are intact")
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    if args[0] not in COMMANDS:
        raise InputError(
            f"minirl has no command {args[0]!r}{did_you_mean(args[0], COMMANDS)}: choose from {', '.join(COMMANDS)}"
        )
    config = parse(args[0], args[1:])
    COMMANDS[args[0]][1](config)


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch has no class of its own for it, and other words on other systems."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    return known or any(text in str(error) for text in words)


def _out_of_memory(command: str) -> str:
    options = _options(COMMANDS[command][0])
    lower = " or ".join(flag for flag in ("--slots", "--micro-batch-tokens") if flag in options)
    recompute = ", or give --recompute (a run goes on with --resume)" if "--recompute" in options else ""
    return f"out of memory: {f'lower {lower}{recompute}' if lower else 'free some'}"


def _fail(sentence: str) -> None:
    print(f"minirl: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
