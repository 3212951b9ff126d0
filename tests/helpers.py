"""Shared by the tests: small models, a small task, displays that remember, what commands leave behind, made-up runs.

Models have odd sizes, so that no two dimensions can be mistaken for one another.
"""

import io
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from minirl import grpo, ppo
from minirl.attention import Packed
from minirl.batch import Batch, make_batch
from minirl.lab.rewards import rewards_of
from minirl.model import ModelConfig, Transformer
from minirl.optimizer import AdamW
from minirl.policy import policy_gradient
from minirl.prompts import Prompts
from minirl.rollout import Rollout, scored_batch
from minirl.run import TIMED, Display, Run
from minirl.step import Step
from minirl.stored import Stored
from minirl.task import Task
from minirl.tokenizer import Tokenizer

# --- golden numbers --------------------------------------------------------------------------------------------------

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))["cases"]


def f64(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict, dict]:
    """Return inputs, options and expected numbers of a case that was worked out independently of this code."""
    case = GOLDEN[name]
    return {k: f64(v) for k, v in case["inputs"].items()}, case["params"], case["expected"]


def close(actual: torch.Tensor, expected, tol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


# --- models ----------------------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=53,
    width=20,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=14,
    mlp_width=31,
    rope_theta=100.0,
    max_positions=256,
)


def tiny_config(**changes) -> ModelConfig:
    return replace(CONFIG, **changes)


def tiny_model(seed: int = 0, **changes) -> Transformer:
    """Make random weights, norms and biases too, wide enough that the logits tell one token from another."""
    return randomise(Transformer(tiny_config(**changes)), seed)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter: fresh biases of 0 and norms of 1 would hide that they are not used."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(noise * (0.3 if p.dim() == 1 or "embed" in name else p.shape[1] ** -0.5))
    return model


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Compare two models bit by bit. Their logits need not be compared so: a processor may add in another order
    where the weights lie at another address."""
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(p, theirs[name]) for name, p in one.state_dict().items()
    )


def fp32_tolerance(in_fp32: dict[str, torch.Tensor], in_fp64: dict[str, torch.Tensor]) -> float:
    """Bound the error of a second fp32 computation, relative to the largest entry of all of the one in float64: four
    times the error of a first, and at least four roundings."""
    largest = max(x.abs().max().item() for x in in_fp64.values())
    error = max((in_fp32[name].double() - x).abs().max().item() for name, x in in_fp64.items())
    return 4 * max(error / largest, torch.finfo(torch.float32).eps)


def random_ids(count: int, vocab: int = CONFIG.vocab_size, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def hidden_states(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    """[T, D] of one plain causal row."""
    layout = Packed([(list(tokens), [])])
    return model(layout.tokens, layout)


def full_logits(model: Transformer, tokens: Sequence[int]) -> torch.Tensor:
    """[T, V] of one plain causal row, in the model's precision."""
    return hidden_states(model, tokens) @ model.head_weight.t()


ALPHABET = "0123456789+=~(,)"  # one token a character


def tiny_checkpoint(folder: str | Path, seed: int = 0, **changes) -> Path:
    """A checkpoint on disk that reads and writes sums, with random weights."""
    tokenizer = Tokenizer.from_chars(ALPHABET)
    sizes = {"width": 32, "layers": 1, "heads": 4, "head_dim": 8, "mlp_width": 48, "max_positions": 32}
    model = tiny_model(seed, **{"vocab_size": tokenizer.vocab_size, **sizes, **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the gradients away from the model."""
    taken = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return taken


def check_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare tensors by name; the tolerance is relative to the largest entry of all."""
    largest = max(g.abs().max().item() for g in wanted.values())
    assert largest > 0
    assert got.keys() == wanted.keys()
    for name, g in wanted.items():
        assert (got[name] - g).abs().max().item() <= tolerance * largest, name


# --- tokenizers ------------------------------------------------------------------------------------------------------

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def byte_level(*special: str) -> tokenizers.Tokenizer:
    """Make every byte a token, with one merge, and special tokens behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "us"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("u", "s")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def write_folder(path: Path, backend: tokenizers.Tokenizer | None = None, **files) -> Path:
    """Make a model folder; `tokenizer_config={...}` becomes tokenizer_config.json."""
    path.mkdir(exist_ok=True)
    (backend or byte_level(START, END, PAD)).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


# --- the task of sevens: a completion is right that holds a 7 --------------------------------------------------------


def has_seven(prompts, completions, **columns) -> list[float]:
    return [float("7" in c) for c in completions]


def sevens(prompts, completions, **columns) -> list[float]:
    return [c.count("7") / 4 for c in completions]


EXAMPLES = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(5) for j in range(5)]
TASK = Task("sevens", EXAMPLES[:20], EXAMPLES[20:], {"seven": (1.0, has_seven)}, has_seven, lambda text: text or None)
SMALL = {"steps": 2, "prompts": 4, "group": 6, "max_tokens": 6, "lr": 1e-2, "eval_prompts": 4, "eval_samples": 2}


# --- displays and files ----------------------------------------------------------------------------------------------


class Quiet(Display):
    """Print nothing and remember what is said."""

    def __init__(self):
        self.lines: list[str] = []
        self.bars: list[tuple[str, int, int]] = []  # stage, done, total

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.bars.append((stage, done, total))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def write_jsonl(path: str | Path, rows: Sequence) -> Path:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(path)


def read_jsonl(path: str | Path) -> list[dict]:
    """Split at newlines only: JSON strings may hold other line ends."""
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def records(run: str | Path, name: str = "metrics.jsonl") -> list[dict]:
    """Read a log of a run."""
    return read_jsonl(Path(run, name))


def untimed(run: str | Path) -> list[dict]:
    """Read the metrics of a run, without what was measured by the clock."""
    return [{key: x for key, x in record.items() if not key.startswith(TIMED)} for record in records(run)]


def all_files(folder: str | Path = ".") -> list[Path]:
    """List files and folders, those that importing leaves aside."""
    return sorted(path for path in Path(folder).rglob("*") if "__pycache__" not in path.parts)


def check_same(a: Path, b: Path, what: object = "") -> None:
    """Compare two runs: the same files with the same bytes, and metrics but for times."""
    names = [[path.relative_to(run) for path in all_files(run) if path.is_file()] for run in (a, b)]
    assert names[0] == names[1], what
    for name in names[0]:
        if name.name == "metrics.jsonl":
            assert untimed(a) == untimed(b), what
        elif name.name == "manifest.json":  # the logs that it knows hold times
            files = [json.loads((run / name).read_text())["files"] for run in (a, b)]
            assert files[0] == files[1], what
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), (name, what)


def sentence(stderr: str) -> str:
    """Check that a command said one sentence and no more."""
    assert stderr.startswith("minirl: ") and stderr.endswith("\n"), stderr
    assert stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
    return stderr


# --- the stages of a run ---------------------------------------------------------------------------------------------


class Trainer:
    """What a run of GRPO or PPO holds, and the stages of a step one at a time."""

    def __init__(self, page, config, task: Task = TASK, stored: Sequence[dict] = ()):
        """`page` is the module minirl.grpo or minirl.ppo."""
        self.page, self.config, self.task, self.display = page, config, task, Quiet()
        self.run = Run(config.out, {}, config.resume, self.display)

        def source(policy, config, display):
            if stored:
                return Stored(stored, policy.tokenizer, policy.model.config, config, display)
            return Prompts(task, policy, config, display)

        self.parts = page.prepare(self.run, config, source, rewards_of(config, task))
        self.policy, self.source, self.rewards = self.parts.policy, self.parts.source, self.parts.rewards
        self.model, self.tokenizer, self.optimizer = self.policy.model, self.policy.tokenizer, self.policy.optimizer
        self.reference, self.beta = self.parts.reference.model, self.parts.beta
        self.critic = self.parts.critic if page is ppo else None
        self.metrics: dict[str, float] = {}  # of the last step or stage

    @property
    def cursor(self) -> int:
        return self.parts.cursor.batches

    @cursor.setter
    def cursor(self, batches: int) -> None:
        self.parts.cursor.batches = batches

    def begin(self, number: int) -> Step:
        """Begin a step, whose metrics are read in `metrics`."""
        self.run.done = number
        step = self.run.step = Step(self.run, number, self.config.steps)
        self.metrics = step.metrics
        return step

    def draw(self, number: int) -> Rollout:
        """Draw batch `number` and reward it."""
        return scored_batch(self.source, number, self.rewards, self.config, self.begin(0))

    def collect(self, number: int) -> Rollout:
        """Sample and reward what step `number` trains on, and let reward models take note of it; the cursor stays."""
        rollout = self.page.collect(self.source, self.parts.cursor, self.rewards, self.config, self.begin(number))
        self.rewards.watch(rollout)
        return rollout

    def batch(self, rollout: Rollout) -> Batch:
        """Lay a rollout out as rows with their advantages and the mask of what is trained."""
        batch = make_batch(rollout, self.policy, self.parts.reference, self.config)
        if self.page is ppo:
            found = ppo.estimate_advantages(rollout, batch, self.parts.critic, self.beta, self.config)
            batch.advantages, batch.old_values, batch.returns = found
        else:
            batch.advantages = grpo.estimate_advantages(rollout, batch, self.tokenizer, self.beta, self.config)
            batch.mask = grpo.trained_tokens(rollout, batch, self.config)
        return batch

    def gradient(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Take the gradient of the loss from where the optimizer collects it; a head on the trunk keeps its own."""
        further = self.critic.loss if self.critic and not self.critic.own else None
        policy_gradient(self.policy, batch, self.config.loss, self.config, further)
        return self.collected()

    def collected(self) -> dict[str, torch.Tensor]:
        """Take away what the optimizer has collected."""
        found, self.optimizer.grads = self.optimizer.grads, {}
        return found

    def step(self, number: int) -> dict[str, float]:
        """Take a whole step; return its metrics."""
        with self.run:
            (ppo.ppo_step if self.page is ppo else grpo.grpo_step)(self.begin(number), self.config, self.parts)
        return self.metrics


# --- runs that end early ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a signal would: no handler of errors sees it."""


def at_update(monkeypatch, number: int, act) -> None:
    """Do something in the place of the n-th optimizer step, or before it."""
    step, calls = AdamW.step, count(1)

    def wrapped(self, *args):
        if next(calls) == number:
            act()
        return step(self, *args)

    monkeypatch.setattr(AdamW, "step", wrapped)


def kill():
    raise Killed


# --- made-up records of runs, as metrics.jsonl has them --------------------------------------------------------------


def healthy(step: int, steps: int, seed: int = 0) -> dict:
    """Make the record that a good GRPO run logs after a step."""
    rng = random.Random(f"{seed} {step}")
    x = step / steps
    learned = 1 / (1 + math.exp(4 - 8 * x - 0.3 * seed))

    def near(value: float, spread: float = 0.1) -> float:
        return value * math.exp(rng.gauss(0, spread))

    accuracy = min(1.0, max(0.0, 0.25 + 0.45 * learned + rng.gauss(0, 0.04)))
    return {
        "step": step,
        "reward/mean": accuracy + 0.2 * min(1, 0.5 + x),
        "reward/max": 1.2,
        "reward/correct": accuracy,
        "reward/format": min(1, 0.5 + x),
        "reward/repetition": -near(0.04),
        "reward/unscored_frac": 0.0,
        "group/signal_frac": min(1.0, near(0.6)),
        "group/all_correct_frac": near(0.1),
        "group/all_wrong_frac": near(0.3),
        "len/mean": near(80 + 30 * x),
        "len/p95": near(130 + 40 * x),
        "truncated_frac": near(0.02, 0.4),
        "repetition_frac": near(0.01, 0.4),
        "too_short_frac": 0.0,
        "entropy": near(0.25 + 0.35 * (1 - x)),
        "kl_ref/k3": near(0.08 * x + 1e-4, 0.2),
        "kl_old/k3": near(2e-4),
        "clip/frac": near(0.004, 0.4),
        "mismatch/abs_mean": near(2e-3),
        "mismatch/abs_max": near(4e-2, 0.3),
        "grad_norm": near(0.4, 0.3),
        "lr": 1e-6,
        "tokens_per_s/rollout": near(5200, 0.05),
        "tokens_per_s/train": near(11800, 0.05),
    }


def evaluation(step: int, steps: int, seed: int = 0) -> dict:
    rng = random.Random(f"eval {seed} {step}")
    mean = 0.26 + 0.42 / (1 + math.exp(4 - 8 * step / steps)) + rng.gauss(0, 0.01)
    accuracies = {
        "eval/mean": mean,
        "eval/greedy": mean + 0.05,
        "eval/pass@8": 0.5 + mean / 2,
        "eval/maj@8": mean + 0.08,
    }
    return accuracies | {"eval/prompts": 64, "eval/samples": 8, "eval/temperature": 1.0, "eval/len_mean": 90.0}


def run_of(steps: int = 100, seed: int = 0, **changes) -> list[dict]:
    """The records of a healthy run; a change is a function of the run's fraction x and what the metric would be, NaN
    where a healthy run has none."""
    records = [{"step": 0, **evaluation(0, steps, seed)}]
    for step in range(1, steps + 1):
        record = healthy(step, steps, seed)
        record |= evaluation(step, steps, seed) if step % 10 == 0 else {}
        records.append(record)
    for name, change in changes.items():
        having = [record for record in records if name in record] or records[1:]
        for record in having:
            record[name] = change(record["step"] / steps, record.get(name, math.nan))
    return records


def sft_run(steps: int = 60) -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "step": step,
            "loss": 0.4 + 2 * math.exp(-step / 12) + rng.gauss(0, 0.03),
            "entropy": 0.4 + 1.8 * math.exp(-step / 10) + rng.gauss(0, 0.02),
            "grad_norm": 0.5 + 3 * math.exp(-step / 5) + abs(rng.gauss(0, 0.1)),
            "lr": 1e-5 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "tokens": 4000,
            "tokens_per_s/train": 21000 + rng.gauss(0, 300),
            "memory/peak_gb": 3.1,
        }
        for step in range(1, steps + 1)
    ]
