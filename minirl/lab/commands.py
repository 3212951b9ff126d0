"""The commands. Each is a config dataclass, whose field docstrings are its --help, and a function that takes it."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from minirl.config import CheckpointConfig, SamplingConfig
from minirl.errors import InputError
from minirl.grpo import GRPOConfig
from minirl.lab.demo import DemoConfig, run_demo
from minirl.lab.display import RichDisplay, print_table
from minirl.lab.eval_command import EvalConfig, evaluation, prompt_text
from minirl.lab.logs import read_metrics
from minirl.lab.report import plot, read_log, report
from minirl.lab.training import sample_outcomes, train_grpo, train_ppo, train_prefer, train_reward, train_rft, train_sft
from minirl.outcomes import FILES, PART, OutcomesConfig
from minirl.policy import load
from minirl.ppo import PPOConfig
from minirl.prefer import PreferConfig
from minirl.reward_training import RewardConfig
from minirl.rft import RFTConfig
from minirl.rollout import completion_text
from minirl.run import holds_run
from minirl.sampler import Sampler
from minirl.sft import SFTConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig, CheckpointConfig):
    """Complete prompts with a checkpoint."""

    prompts: tuple[str, ...] = field(kw_only=False)
    """Prompts; a checkpoint with a chat template takes each as a user message."""
    raw: bool = False
    """Continue the text as it stands, without the chat template."""
    n: int = 1
    """Completions a prompt."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the largest probability."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; what is printed ends before them."""
    json: bool = False
    """Print one JSON object a completion, with tokens and log-probs."""

    def __post_init__(self):
        super().__post_init__()
        if not self.prompts:
            raise InputError("--prompts is empty: give at least one")


@dataclass(frozen=True)
class ReportConfig:
    """Draw a run: plot.png and report.html in its folder."""

    run: str
    """Folder of the run."""


def generate(c: GenerateConfig) -> None:
    model, tokenizer = load(c.model, c.dtype, c.device, config=c)
    params = c.sampling_params(c.n, stop_ids=tokenizer.stop_ids, seed=c.seed)
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


@contextmanager
def said_if_nothing_is_left(display: RichDisplay, is_left: Callable[[], bool]) -> Iterator[None]:
    """Say so where Ctrl-C comes while a model is loaded, or prompts are measured."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_left():
            display.line("stopped before the first step; nothing was written")
        raise


def training(train: Callable) -> Callable:
    """Make the command of a run that trains: do it, then draw it."""

    def command(config) -> None:
        with RichDisplay() as display, said_if_nothing_is_left(display, lambda: holds_run(config.out)):
            model = train(config, display)
        print(f"model:  {model}")
        draw(ReportConfig(config.out))

    return command


def outcomes(config: OutcomesConfig) -> None:
    written = [Path(config.out) / name for name in (*FILES, PART)]
    with RichDisplay() as display, said_if_nothing_is_left(display, lambda: any(file.exists() for file in written)):
        files = sample_outcomes(config, display)
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
    print_table("held-out accuracy on sums of two numbers below 100", columns, rows)
    for line in _last_completions(runs[0]):
        display.line(line)
    png = plot(runs, out / "demo.png", [f"seed {seed}" for seed in config.seeds])
    print(f"curves: {png}\nmodel:  {runs[0] / 'model'}")


def _last_completions(run: Path, count: int = 6) -> list[str]:
    lines = (run / "completions.jsonl").read_bytes().split(b"\n")[:-1]  # not splitlines: a text may hold other ends
    records = [json.loads(line) for line in (*lines[: count // 2], *lines[-count // 2 :])]
    return [
        f"step {r['step']:>3}: {prompt_text(r['prompt'])} {r['completion']}  (reward {r['reward']:g})" for r in records
    ]


def draw(c: ReportConfig) -> None:
    folder, log = Path(c.run), read_log(c.run)
    for note in log.notes:
        print(note, file=sys.stderr)
    print(f"plot:   {plot([log], folder / 'plot.png', [str(folder)])}\nreport: {report(folder, log)}")


COMMANDS: dict[str, tuple[type, Callable]] = {
    "demo": (DemoConfig, demo),
    "generate": (GenerateConfig, generate),
    "eval": (EvalConfig, evaluation),
    "sft": (SFTConfig, training(train_sft)),
    "outcomes": (OutcomesConfig, outcomes),
    "rft": (RFTConfig, training(train_rft)),
    "prefer": (PreferConfig, training(train_prefer)),
    "reward": (RewardConfig, training(train_reward)),
    "grpo": (GRPOConfig, training(train_grpo)),
    "ppo": (PPOConfig, training(train_ppo)),
    "report": (ReportConfig, draw),
}
