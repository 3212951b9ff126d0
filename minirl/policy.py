"""The policy that is trained, its frozen reference and its update; how a checkpoint becomes model and tokenizer."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minirl.batch import Batch, add_policy_gradient
from minirl.errors import InputError
from minirl.kernels.per_token import k3
from minirl.losses import PolicyLoss
from minirl.model import ScalarHead, Transformer
from minirl.optimizer import AdamW
from minirl.rollout import Rollout, counted
from minirl.run import Run
from minirl.sampler import Sampler
from minirl.step import Step
from minirl.tokenizer import Tokenizer
from minirl.trees import Row, response_logprobs

OPTIMIZER = "optimizer.safetensors"


# ---- what a run holds ------------------------------------------------------------------------------------------------


class Policy:
    """A model that is trained, with its tokenizer; its optimizer and its sampler."""

    optimizer: AdamW | None = None

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.model.checkpointing = config.recompute

    @classmethod
    def load(cls, config, run: Run, scalar_head: bool | ScalarHead = False) -> "Policy":
        """Load the run's last checkpoint, or config.model where there is none."""
        source = run.checkpoint or config.model
        return cls(*load(source, config.dtype, config.device, scalar_head, config, run), config)

    def with_optimizer(self, betas: tuple[float, float] = (0.9, 0.999)) -> "Policy":
        """Make the optimizer, which collects every gradient from now on."""
        self.optimizer = AdamW(self.model, betas, weight_decay=self.config.weight_decay)
        return self

    @property
    def sampler(self) -> Sampler:
        return Sampler(self.model, self.config.slots, tokenizer=self.tokenizer)

    def logprobs(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the log-probs [B, T] of the rows, without gradient."""
        return response_logprobs(self.model, rows, *budget_of(self.config))

    @property
    def models(self) -> list[torch.nn.Module]:
        """Return the models that a checkpoint holds."""
        return [self.model]

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.optimizer.state_dict(), folder / OPTIMIZER)

    def restore(self, folder: Path, state: dict) -> None:
        """Load the optimizer's state; the weights were loaded from there."""
        restore_optimizer(self.optimizer, folder)


def restore_optimizer(optimizer: AdamW, folder: Path) -> None:
    """Load the optimizer's state from a folder of a checkpoint."""
    file = folder / OPTIMIZER
    checkpoint = next((part for part in (folder, *folder.parents) if part.name.startswith("step-")), folder)
    try:
        optimizer.load_state_dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or missing ({error}): remove {checkpoint} to resume earlier") from None


class Reference:
    """The frozen policy that a KL is measured to: the checkpoint that the run began with, or that of the last reset."""

    FOLDER = "reference"

    def __init__(self, policy: Policy, config, run: Run):
        self.config, self.model = config, None
        if config.has_reference:
            saved = run.checkpoint if config.ref_reset_every else None
            source, old = saved / self.FOLDER if saved else config.model, policy.model
            self.model = Transformer.from_pretrained(source, old.dtype, old.device).requires_grad_(False)
            self.model.active_vocab = old.active_vocab

    def logprobs(self, rows: Sequence[Row]) -> torch.Tensor | None:
        """Return the log-probs [B, T] of the rows; None without a reference."""
        return None if self.model is None else response_logprobs(self.model, rows, *budget_of(self.config))

    def reset(self, policy: Policy) -> None:
        self.model.load_state_dict(policy.model.state_dict())

    @property
    def models(self) -> list[torch.nn.Module]:
        return [self.model] if self.config.ref_reset_every else []

    def save(self, folder: Path) -> None:
        if self.config.ref_reset_every:
            self.model.save_pretrained(folder / self.FOLDER)

    def restore(self, folder: Path, state: dict) -> None:
        """Do nothing: the weights were loaded from there."""


class Cursor:
    """How many batches of prompts are behind the run: a step that failed is drawn again when the run is resumed."""

    models = ()

    def __init__(self):
        self.batches = 0

    def save(self, folder: Path) -> dict:
        return {"cursor": self.batches}

    def restore(self, folder: Path, state: dict) -> None:
        self.batches = int(state.get("cursor", state["step"]))


def budget_of(config) -> tuple[int, float]:
    """Return the tokens of a forward and the temperature, which every forward over rows takes from the config."""
    return config.micro_batch_tokens, config.temperature


# ---- its update ------------------------------------------------------------------------------------------------------


def policy_gradient(
    policy: Policy, part: Batch, loss: PolicyLoss, config, further_loss=None
) -> dict[str, float] | None:
    """Add the gradient of one optimizer step; returns its metrics, None where nothing has a gradient."""
    known = config.target_kl is not None
    return add_policy_gradient(policy.model, part, loss, *budget_of(config), further_loss, known)


def past_target_kl(metrics: dict[str, float] | None, config) -> bool:
    """Tell whether the policy is further from the one that sampled than a step's updates may take it; not by a part
    without metrics, of which no token has a gradient."""
    return config.target_kl is not None and (metrics or {}).get("kl_old/k3", 0.0) > config.target_kl


def log_updates(step: Step) -> None:
    """Log what the updates have measured, means over those that have a metric, and tokens per second; what
    `log_rollout` knows of every token stands.

    Rows without a gradient are not computed, so they are not counted in the speed of training.
    """
    updates = [metrics for metrics in step.updates if metrics is not None]
    names = dict.fromkeys(name for metrics in updates for name in metrics)
    means = {name: float(np.mean([m[name] for m in updates if name in m])) for name in names}
    means |= {"trained_tokens": sum(m["trained_tokens"] for m in updates), "updates": len(updates)}
    step.add(**means | step.metrics | {"skip_step": len(step.updates) - len(updates)})
    step.speed("train", step.metrics["trained_tokens"])


def log_rollout(step: Step, rollout: Rollout, batch: Batch, config) -> None:
    """Log what is known of every token of a batch before its updates, and the first completion of some prompts."""
    step.add(**sampled_metrics(rollout, batch) | advantage_metrics(rollout, batch, config))
    step.speed("rollout", step.metrics["sampled_tokens"] if rollout.fresh else math.nan)
    step.draws, A = rollout.batches, batch.advantages
    advantages = A if A.dim() == 1 else A.sum(1) / batch.sampled.sum(1).clamp(min=1)  # of tokens: their mean
    for i in range(min(config.shown, len(rollout.prompts))):
        row = i * rollout.group_size
        step.record(
            "completions.jsonl",
            prompt=rollout.examples[i]["prompt"],
            completion=rollout.texts[row],
            reward=rollout.rewards[row].item(),
            advantage=advantages[row].item(),
            finish_reason=rollout.completions[row].finish_reason,
        )


def sampled_metrics(rollout: Rollout, batch: Batch) -> dict[str, float]:
    """Measure entropy and KL to the reference over every token of the batch, with a gradient or without, as far as the
    policy was scored before the update.

    Where it was not, the entropy is the estimate from what was sampled, and the KL is in the loss, which measures it:
    the sampler's log-probs differ from the trainer's by rounding, in bf16 by more than a small KL. Dynamic sampling
    trains on a part of what it samples, so there the estimate stands in any case.
    """
    at, found = batch.sampled, {}
    if batch.old_logp is not None and rollout.everything is None:
        found["entropy"] = batch.entropy[at].double().mean()
    if batch.old_logp is not None and batch.ref_logp is not None:
        d = torch.where(at, batch.old_logp - batch.ref_logp, 0).double()
        found |= {"kl_ref/k1": d[at].mean(), "kl_ref/k3": k3(d[at])[0].mean(), "kl_ref/seq_k1": d.sum(1).mean()}
    return {name: value.item() for name, value in found.items()}


def advantage_metrics(rollout: Rollout, batch: Batch, config) -> dict[str, float]:
    """Measure the spread of the advantages of the completions that count, or of their tokens; of all if none counts."""
    rows = counted(rollout, config).to(batch.mask.device)
    rows = rows if rows.any() else torch.ones_like(rows)
    A = batch.advantages[rows if batch.advantages.dim() == 1 else batch.sampled & rows[:, None]]
    spread = {"mean": A.mean(), "std": A.std(correction=0), "min": A.min(), "max": A.max()}
    return {f"adv/{name}": value.item() for name, value in spread.items()}


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    dtype: str,
    device: str,
    scalar_head: bool | ScalarHead = False,
    config=None,
    run: Run | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load a checkpoint's model and tokenizer, which must belong together. The tokenizer puts the template variables
    and the system message of a command's `config` into every prompt, with the date of the `run`."""
    where = pick_device(device)
    model = Transformer.from_pretrained(source, pick_dtype(dtype, where), where, scalar_head)
    tokenizer = Tokenizer.from_pretrained(source)
    if config is not None:
        tokenizer.prompt_with(config.template, config.system)
    if run is not None:
        run.keep_date(tokenizer)
    model.active_vocab = min(tokenizer.vocab_size, model.config.vocab_size)
    for stop in tokenizer.stop_ids:
        if stop >= model.active_vocab:
            raise InputError(
                f"{source}: stop token {stop} (eos_token_id) is outside the model's vocabulary of "
                f"{model.active_vocab}, so nothing would ever stop: correct generation_config.json or config.json"
            )
    return model, tokenizer


def pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise InputError(f"device {name!r} is unknown: choose from auto, cpu, cuda")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} was asked for and there is none: use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
