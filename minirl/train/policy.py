"""The loop of every algorithm that trains on its own samples, and the stages of its step.

    for each step:  prompts -> completions -> rewards -> advantages -> one or more updates of the one policy loss

GRPO and PPO differ in what they make of the rewards (`credit`) and in what has a gradient (`gradient`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minirl.advantages import kl_in_reward
from minirl.alarms import Alarms
from minirl.errors import InputError
from minirl.evaluate import evaluate
from minirl.files import contents
from minirl.kernels.per_token import k3
from minirl.model import Transformer
from minirl.rewards import load_reward
from minirl.rewards.model import RewardModel
from minirl.rewards.rules import Reward, overlong_penalty
from minirl.rollout import Rollout, sample, task_guarded, task_rewards
from minirl.sampler import Sampler
from minirl.tasks import Task, parse_task
from minirl.train.batch import Row, score, score_with_entropy
from minirl.train.config import PolicyConfig
from minirl.train.kl import KLWeight
from minirl.train.no_effect import without_effect
from minirl.train.online_reward import OnlineReward, agreement
from minirl.train.optimizer import AdamW, learning_rate
from minirl.train.preview import Disk, disk_of, marked_prompt, marked_row, show_disk
from minirl.train.prompts import Prompts, judged_lengths, measure, rendered, show_notes, training_place
from minirl.train.run import (
    Display,
    Part,
    Run,
    due,
    identity,
    load,
    loop,
    peak_memory_gb,
    pick_device,
    pick_dtype,
    shown,
)
from minirl.train.sft import order, take
from minirl.train.step import Batch, accumulate, response_mask
from minirl.train.stored import REWARD, Stored, read_triples

REWARD_MODEL = "reward_model"  # folder of a refreshed one, in a checkpoint and at the end of a run


class PolicyTrainer:
    """Everything that a run holds, and one method for each stage of a step."""

    def __init__(self, config: PolicyConfig, run: Run, display: Display, task: Task, stored: Sequence[dict] = ()):
        """`stored`: lines of offline data to train on in place of samples."""
        self.config, self.run, self.display, self.task = config, run, display, task
        self.named: set[tuple[str, str]] = set()  # rewards and their kinds of faults that have been said
        self.faults: list[dict] = []  # of this step, to be logged
        if not self.task.train and not stored:
            raise InputError(f"task {config.task!r} has no training examples: ask for some")
        source = run.checkpoint or config.model
        self.model, self.tokenizer = load(source, config.dtype, config.device, config=config, run=run)
        self.prompts, self.task = self._measured(task, bool(stored))
        if self.prompts and config.prompts > len(self.task.train):
            count = f"prompts = {config.prompts}: there are only {len(self.task.train)} training prompts"
            display.line(f"{count}, so a step samples some of them more than once")
        self.stored = Stored(stored, self.tokenizer, self.model.config, config, display) if stored else None
        self.rewards = {REWARD: (1.0, None)} if stored else self._load_rewards()
        self.judges = [self._judge(*item) for item in self.rewards.items() if isinstance(item[1][1], RewardModel)]
        self.model.checkpointing = config.recompute
        self.reference = self._load_reference() if config.has_reference else None
        self.optimizer = AdamW(self.model, weight_decay=config.weight_decay)
        if run.checkpoint:
            run.restore(self.optimizer)
        self.kl = KLWeight(config, run.state)
        self.cursor = int(run.state.get("cursor", run.start))  # batches of prompts drawn so far
        self.sampler = Sampler(self.model, config.slots, tokenizer=self.tokenizer)
        self.params = replace(config.sampling, stop_ids=self.tokenizer.stop_ids)

    def _measured(self, task: Task, offline: bool) -> tuple[Prompts | None, Task]:
        """The training prompts that are sampled, and the task with what can be completed of both sides."""
        about = self.tokenizer, self.model.config, self.config, self.display
        train = None if offline else measure(task, "train", *about)
        heldout = measure(task, "heldout", *about, most=self.config.eval_prompts)
        return train, replace(task, train=train.examples if train else [], heldout=heldout.examples)

    @property
    def saved(self) -> list[torch.nn.Module]:
        """The models that a checkpoint holds, with the optimizers of those that are trained."""
        reset, refreshed = self.config.ref_reset_every > 0, self.config.refresh.every > 0
        judge = [self.judges[0].reward.model] if refreshed else []
        return [self.model, *([self.reference] if reset else []), *judge]

    def example(self) -> list[Part]:
        """The first prompt that is trained on, with the completion that it is given or stands for one to be sampled."""
        if self.stored:
            prompt, lines = self.stored.groups[0]
            return marked_row(self.tokenizer, Row(prompt, lines[0][1].tokens, 0))
        prompt = rendered(self.task.train[0], self.tokenizer, "the first prompt")
        return marked_prompt(self.tokenizer, prompt, self.config.max_tokens)

    def _load_rewards(self) -> dict[str, tuple[float, Reward]]:
        """The task's rewards and those of the config, which may give one of the task's another weight."""
        rewards, given, learned = task_rewards(self.task), set(), self._learned
        for spec in self.config.rewards:
            name, weight = _name_and_weight(spec) if spec != "guarded" else (spec, 1.0)
            if name in given:
                raise InputError(f"reward {name!r} is given twice: leave one away")
            given.add(name)
            if name == "guarded":
                chosen = {other: reward for other, reward in rewards.items() if other in given}
                rewards = task_guarded(self.task, weight) | chosen
                continue
            place = f"model:{learned}" if learned and name.startswith("model:") else name
            rewards[name] = (weight, rewards[name][1] if name in rewards else load_reward(place))
        return rewards

    @property
    def _learned(self) -> Path | None:
        """Where the reward model that has learned on is taken up again."""
        return self.run.checkpoint / REWARD_MODEL if self.run.checkpoint and self.config.refresh.every else None

    def _judge(self, name: str, reward: tuple[float, RewardModel]) -> OnlineReward:
        """A reward model beside the policy."""
        weight, model = reward
        model.model.to(self.model.device)
        for of_prompts in ("template_variables", "system"):  # it reads the conversation that the policy answered
            setattr(model.tokenizer, of_prompts, getattr(self.tokenizer, of_prompts))
        self.run.keep_date(model.tokenizer)  # also where the policy's template reads none
        self._refuse_short(name, model)
        judge = OnlineReward(name, weight, model, self.config.refresh, self.config.seed)
        if self._learned:
            judge.restore(self.run, REWARD_MODEL)
        return judge

    def _refuse_short(self, name: str, judge: RewardModel) -> None:
        """A reward model must be able to read each prompt, as its own template writes it, with the longest completion
        that the policy's context leaves room for."""
        about = judge.tokenizer, judge.model.config, self.display
        lengths, limit = judged_lengths(self.prompts, name, self.task, *about), judge.model.config.max_positions
        whole = lengths + self.longest_completions
        worst = int(whole.argmax())
        if whole[worst] > limit:
            place = training_place(self.prompts.examples[worst], worst, self.task)
            raise InputError(
                f"{place}: reward {name!r} was made for {limit} tokens, and a prompt of {lengths[worst]} tokens with a "
                f"completion of max_tokens = {self.config.max_tokens} has more: lower --max-tokens, or take another "
                "model"
            )

    @property
    def longest_completions(self) -> np.ndarray:
        """Tokens [N] that a completion of each training prompt may have."""
        return np.minimum(self.config.max_tokens, self.prompts.room - self.prompts.lengths)

    @property
    def longest(self) -> int:
        """Tokens that a prompt with its completion may have, sampled or stored."""
        if self.stored:
            return max(len(prompt) + len(c.tokens) for prompt, lines in self.stored.groups for _, c in lines)
        return int((self.prompts.lengths + self.longest_completions).max())

    def _load_reference(self) -> Transformer:
        """The checkpoint that the run started from, or the policy of the last reset."""
        c, saved = self.config, self.run.checkpoint
        device = pick_device(c.device)
        source = saved / "reference" if saved and c.ref_reset_every else c.model
        reference = Transformer.from_pretrained(source, pick_dtype(c.dtype, device), device).requires_grad_(False)
        reference.active_vocab = self.model.active_vocab
        return reference

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self, step: int) -> dict[str, float]:
        """Rollout, rewards, advantages, updates; returns the step's metrics."""
        started = time.perf_counter()
        try:
            rollout = self.collect(step)
        except InputError as error:
            if step == self.run.start:
                raise
            self.save(step)  # nothing of this step has reached the model
            raise type(error)(
                f"{error}; the {step} steps before it are saved: add --resume to go on from there"
            ) from None
        sampled = time.perf_counter()
        metrics = rollout.stats | self.update(rollout, step)
        trained = time.perf_counter()
        if self.config.ref_reset_every and (step + 1) % self.config.ref_reset_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        if self.config.refresh.every and (step + 1) % self.config.refresh.every == 0:
            metrics |= self.refresh(step)
        self.show(rollout, step + 1)
        self.cursor += rollout.batches  # only now: a step that failed is drawn again when the run is resumed
        return metrics | {
            "tokens_per_s/rollout": math.nan if self.stored else metrics["sampled_tokens"] / (sampled - started),
            # Rows without a gradient are not computed, so they are not counted either.
            "tokens_per_s/train": metrics["trained_tokens"] / (trained - sampled)
            if metrics["trained_tokens"]
            else math.nan,
            "time/rollout": sampled - started,
            "time/train": trained - sampled,
            "memory/peak_gb": peak_memory_gb(),
        }

    def show(self, rollout: Rollout, step: int) -> None:
        """Write the first completion of some prompts to completions.jsonl, and what had no reward to faults.jsonl."""
        while self.faults:
            self.run.log_fault(step, **self.faults.pop(0))
        for i in range(min(self.config.shown, len(rollout.prompts))):
            row, completion = i * rollout.group_size, rollout.completions[i * rollout.group_size]
            self.run.log_completion(
                step,
                prompt=rollout.examples[i]["prompt"],
                completion=rollout.texts[row],
                reward=rollout.rewards[row].item(),
                advantage=rollout.advantages[row].item(),
                finish_reason=completion.finish_reason,
            )

    # --- samples and rewards ----------------------------------------------------------------------------------------

    def collect(self, step: int) -> Rollout:
        """Sample the step's prompts and score what comes back. The same call gives the same rollout until `step` has
        moved the cursor on."""
        rollout = self.draw(self.cursor)
        self.watch(rollout)
        rollout.stats = self.statistics(rollout)
        self.say_idle(rollout, step)
        return rollout

    def statistics(self, rollout: Rollout) -> dict[str, float]:
        """Of everything that was sampled for a step, also how far reward models agree with the rule."""
        labels, stats = torch.tensor(self.verdicts(rollout), dtype=torch.float64), rollout.metrics()
        stats |= verdict_metrics(labels, rollout)
        if not self.stored:  # E[−log π]; of stored completions it would be that of another policy
            stats["entropy"] = float(np.mean([-logp for c in rollout.completions for logp in c.logprobs]))
        for i, judge in enumerate(self.judges):
            found = agreement(torch.tensor(rollout.parts[judge.name]), labels, rollout.group_ids)
            stats |= {f"reward_model{i or ''}/{name}": value for name, value in found.items()}
        return stats

    def verdicts(self, rollout: Rollout) -> list[float]:
        """What the task's rule says of each completion, 1 is right; of stored completions their reward."""
        names = [name for name, (_, function) in self.rewards.items() if function is self.task.correct]
        return rollout.parts[(names or [REWARD])[0]]

    @property
    def pay(self) -> float:
        """How much the reward of a right completion is above that of a wrong one, as far as it is known: the weight of
        the task's rule, which gives 0 to 1; 1 where that is 0 or rewards are stored."""
        return abs(sum(weight for weight, function in self.rewards.values() if function is self.task.correct)) or 1.0

    def refresh(self, step: int) -> dict[str, float]:
        """Let the reward model learn from what was sampled since the last time."""
        metrics, alarm = self.judges[0].refresh()
        if alarm:
            self.display.line(f"step {step + 1}: {alarm}")
        return metrics

    def draw(self, number: int, steps: bool = False) -> Rollout:
        """Batch `number` of the endless sequence of shuffled epochs of prompts, sampled and scored or stored: a
        function of the config and the weights. `steps`: rewards may be those of steps."""
        c = self.config
        rollout = self.stored.batch(number) if self.stored else self.sample(number, steps)
        if c.overlong_cache:
            penalty = torch.from_numpy(overlong_penalty(rollout.lengths, c.max_tokens, c.overlong_cache))
            rollout.rewards += c.overlong_penalty * self.pay * penalty
        if c.truncation == "penalty":
            rollout.rewards -= c.truncation_penalty * self.pay * rollout.truncated
        return rollout

    def sample(self, number: int, steps: bool) -> Rollout:
        c = self.config
        chosen = take(len(self.task.train), c.seed, number * c.prompts, c.prompts)
        params = replace(self.params, seed=(c.seed << 32) + number)

        def progress(done: int, total: int) -> None:
            self.display.progress("rollout", done, total)

        examples = [self.task.train[i] for i in chosen]
        rollout = sample(self.sampler, self.tokenizer, examples, params, progress, chosen)
        rollout.score(self.rewards, c.reward_timeout, steps, c.on_bad_reward)
        self.name_faults(rollout)
        return rollout

    def watch(self, rollout: Rollout) -> None:
        """Let reward models take note of all that a step has sampled, once none of it can fail any more."""
        for judge in self.judges:
            judge.watch(rollout, self.verdicts(rollout))

    def say_idle(self, rollout: Rollout, step: int) -> None:
        """In the first step it is an error; later it may be a passing failure, which must not cost the run."""
        if step == 0:
            rollout.require_score()
        rollout.idle = rollout.unscored or rollout.idle
        if rollout.idle:
            self.display.line(f"step {step + 1} trains nothing: {rollout.idle}")

    def name_faults(self, rollout: Rollout) -> None:
        """Each kind of each reward is said once; all are logged, with the step."""
        for key, line in rollout.fault_lines().items():
            if key not in self.named:
                self.named.add(key)
                self.display.line(line)
        for fault in rollout.faults:
            example, text = rollout.indices[fault.row // rollout.group_size], rollout.texts[fault.row]
            known = {"reward": fault.reward, "fault": fault.kind, "prompt": example, "completion": text}
            self.faults.append(known | {"sentence": fault.sentence})

    # --- from rewards to advantages ---------------------------------------------------------------------------------

    def batch(self, rollout: Rollout) -> Batch:
        """Rows, mask, log-probs and advantages of a rollout."""
        c, device = self.config, self.model.device
        prompts = [rollout.prompts[i // rollout.group_size] for i in range(len(rollout.completions))]
        rows = [
            Row(prompt, completion.tokens, i // rollout.group_size, completion.kept)
            for i, (prompt, completion) in enumerate(zip(prompts, rollout.completions, strict=True))
        ]
        present = response_mask(rows, device)
        old = entropy = ref = reported = None
        if self.stored is None or self.stored.logprobs:
            reported = torch.zeros(present.shape, device=device)
            reported[present] = torch.tensor([lp for x in rollout.completions for lp in x.logprobs], device=device)
        if c.epochs * c.mini_batches > 1 or c.kl_in_reward or c.adaptive_kl != "none" or reported is None:
            old, entropy = score_with_entropy(self.model, rows, c.micro_batch_tokens, c.temperature)
        if self.reference is not None:
            ref = self.score(self.reference, rows)
        mask = present & self.counted(rollout).to(device)[:, None]  # final before `credit` whitens over it
        zeros, more = torch.zeros(len(rows), device=device), {"sampled": present, "entropy": entropy}
        batch = Batch(rows, zeros, mask, old, ref, reported, **more)
        rewards = rollout.rewards.to(device)
        if c.exclude_from_baseline:
            rewards = rewards.masked_fill(rollout.truncated.to(device), math.nan)
        self.credit(rollout, batch, rewards)
        A = batch.advantages
        rollout.advantages = A if A.dim() == 1 else A.sum(1) / present.sum(1).clamp(min=1)
        if rollout.idle:  # neither KL nor entropy alone shall move the policy
            batch.mask = torch.zeros_like(batch.mask)
        return batch

    def counted(self, rollout: Rollout) -> torch.Tensor:
        """bool [B]: the completions in the loss, hence in its denominators and in statistics of the batch.

        One without a score is not: it teaches nothing, so that neither KL nor entropy nor value learns from it either,
        in GRPO as in PPO. Nor is one that truncation=mask takes out.
        """
        scored = ~rollout.rewards.isnan()
        return scored & ~rollout.truncated if self.config.truncation == "mask" else scored

    def credit(self, rollout: Rollout, batch: Batch, rewards: torch.Tensor) -> None:
        """Turn the rewards [B], NaN where there is none, into `batch.advantages`.

        batch.mask holds the tokens that count in statistics of the batch, batch.sampled every token: a completion that
        truncation=mask takes out stays in the mean of its group, unless exclude_from_baseline gave it the reward NaN.
        """
        raise NotImplementedError

    def token_rewards(self, batch: Batch, rewards: torch.Tensor) -> torch.Tensor:
        """The reward of a completion [B] at its last token, less the KL to the reference of each, [B, T]."""
        if self.config.kl_in_reward:
            return kl_in_reward(rewards, batch.old_logp, batch.ref_logp, batch.sampled, self.kl.in_reward)
        nothing = torch.zeros(batch.mask.shape, device=rewards.device)
        return kl_in_reward(rewards, nothing, nothing, batch.sampled, 0.0)

    def score(self, model: Transformer, rows: list[Row]) -> torch.Tensor:
        return score(model, rows, self.config.micro_batch_tokens, self.config.temperature)

    # --- updates ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, step: int) -> dict[str, float]:
        """μ passes over mini-batches of whole groups; metrics are means over the optimizer steps."""
        c, batch, before = self.config, self.batch(rollout), self.optimizer.steps
        updates, skipped = [], 0
        for indices in self.mini_batches(step, len(rollout.prompts)):
            metrics = self.gradient(batch.select(indices), step)
            if c.target_kl is not None and metrics.get("kl_old/k3", 0.0) > c.target_kl:
                self.forget()
                break
            if metrics:
                updates.append(metrics | self.apply(step))
            skipped += not metrics
        names = dict.fromkeys(name for metrics in updates for name in metrics)
        means = {name: float(np.mean([m[name] for m in updates if name in m])) for name in names}
        means["trained_tokens"] = sum(m["trained_tokens"] for m in updates)
        means |= self.sampled_metrics(rollout, batch) | self.advantage_metrics(rollout, batch)
        means |= {"lr": self.rate(step, c.lr), "updates": len(updates), "skip_step": skipped}
        return means | self.kl.adapt(batch, self.optimizer.steps > before, lambda: self.score(self.model, batch.rows))

    def advantage_metrics(self, rollout: Rollout, batch: Batch) -> dict[str, float]:
        """The spread of the advantages of the completions that count, or of their tokens; of all where none counts."""
        counted = self.counted(rollout).to(batch.mask.device)
        rows = counted if counted.any() else torch.ones_like(counted)
        A = batch.advantages[rows if batch.advantages.dim() == 1 else batch.sampled & rows[:, None]]
        spread = {"mean": A.mean(), "std": A.std(correction=0), "min": A.min(), "max": A.max()}
        return {f"adv/{name}": value.item() for name, value in spread.items()}

    def sampled_metrics(self, rollout: Rollout, batch: Batch) -> dict[str, float]:
        """Entropy and KL to the reference over every token of the batch, with a gradient or without, as far as the
        policy was scored before the update.

        Where it was not, the entropy is the estimate of `statistics`, and the KL is in the loss, which measures it: the
        sampler's log-probs differ from the trainer's by rounding, in bf16 by more than a small KL. Dynamic sampling
        trains on a part of what it samples, so there the estimate stands in any case.
        """
        estimate = {name: value for name, value in rollout.stats.items() if name == "entropy"}
        if batch.old_logp is None:
            return estimate
        at, found = batch.sampled, {}
        if not getattr(self.config, "dynamic_sampling", False):
            found["entropy"] = batch.entropy[at].double().mean()
        if batch.ref_logp is not None:
            d = torch.where(at, batch.old_logp - batch.ref_logp, 0).double()
            found |= {"kl_ref/k1": d[at].mean(), "kl_ref/k3": k3(d[at])[0].mean(), "kl_ref/seq_k1": d.sum(1).mean()}
        return estimate | {name: value.item() for name, value in found.items()}

    def mini_batches(self, step: int, groups: int) -> Iterator[list[int]]:
        """The rows of each update."""
        c = self.config
        for epoch in range(c.epochs):
            shuffled = order(groups, c.seed, 1 + step * c.epochs + epoch)
            for part in np.array_split(shuffled, min(c.mini_batches, groups)):
                yield [g * c.group + j for g in sorted(part.tolist()) for j in range(c.group)]

    def gradient(self, batch: Batch, step: int) -> dict[str, float]:
        """Accumulate the gradient of one optimizer step; its metrics, none where nothing has a gradient."""
        c, known = self.config, self.config.target_kl is not None
        return accumulate(self.model, batch, self.kl.loss, c.micro_batch_tokens, c.temperature, None, known)

    def apply(self, step: int) -> dict[str, float]:
        return {"grad_norm": self.optimizer.step(self.rate(step, self.config.lr), self.config.clip_norm)}

    def forget(self) -> None:
        """Drop the gradient."""
        self.optimizer.zero_grad()

    def rate(self, step: int, peak: float) -> float:
        c = self.config
        return learning_rate(step, peak, c.warmup, c.steps, c.schedule)

    # --- the run ----------------------------------------------------------------------------------------------------

    def disk(self) -> Disk:
        """What the run will write."""
        c = self.config
        finished = [self.model, *([self.judges[0].reward.model] if c.refresh.every else [])]
        return disk_of(self.run, self.saved, c.steps, c.save_every, finished)

    def evaluate(self, first: bool = False) -> dict[str, float]:
        """`first`: before anything is trained, so that what is wrong may end the run."""
        c = self.config

        def progress(done: int, total: int) -> None:
            self.display.progress("evaluation", done, total)

        params = replace(self.params, n=c.eval_samples, seed=(c.seed << 32) + (1 << 31))
        examples = self.task.heldout[: c.eval_prompts]
        result = evaluate(
            self.sampler,
            self.tokenizer,
            self.task,
            params,
            examples,
            timeout=c.reward_timeout,
            progress=progress,
            require_score=first,
            on_bad=c.on_bad_reward if first else "skip",  # later it must not cost the steps before it
        )
        for line in result.rollout.fault_lines().values():
            self.display.line(f"held-out: {line}")
        return result.metrics

    def save(self, step: int) -> None:
        self.run.save(
            step, self.model, self.tokenizer, self.optimizer, self.save_more, cursor=self.cursor, **self.kl.state
        )

    def save_more(self, folder: Path) -> None:
        """What a checkpoint holds beside the policy."""
        if self.config.ref_reset_every:
            self.reference.save_pretrained(folder / "reference")
        if self.config.refresh.every:
            self.judges[0].save(folder / REWARD_MODEL)


def verdict_metrics(labels: torch.Tensor, rollout: Rollout) -> dict[str, float]:
    """Shares of groups that are all right and all wrong, and mean lengths of right and wrong completions, by the rule
    (1 is right, NaN unknown) [B]; of nothing they are NaN."""
    groups, right = labels.view(-1, rollout.group_size), labels == 1
    wrong, lengths = ~right & ~labels.isnan(), torch.tensor(rollout.lengths, dtype=torch.float64)
    return {
        "group/all_correct_frac": (groups == 1).all(1).double().mean().item(),
        "group/all_wrong_frac": (groups < 1).all(1).double().mean().item(),
        "len/correct_mean": lengths[right].mean().item(),
        "len/wrong_mean": lengths[wrong].mean().item(),
    }


def _name_and_weight(spec: str) -> tuple[str, float]:
    name, _, weight = spec.rpartition("=")
    try:
        if math.isfinite(float(weight)):
            return name, float(weight)
    except ValueError:
        pass
    raise InputError(f"reward {spec!r} must be given as name=weight with a number, for instance format=0.2")


def step_line(step: int, steps: int, m: dict) -> str:
    """What matters, first things first."""
    held = (
        f"  held-out {shown(m, 'eval/mean', '.3f')} (greedy {shown(m, 'eval/greedy', '.3f')})"
        if "eval/mean" in m
        else ""
    )
    kl = next((name for name in ("kl_ref/k3", "kl_old/k3") if name in m), "trained/kl_old/k3")
    critic = f"critic {shown(m, 'value/explained_var', '.2f')}" if "value/mean" in m else ""
    judge = f"judge {shown(m, 'reward_model/accuracy', '.2f')}  " if "reward_model/accuracy" in m else ""
    return (
        f"step {step}/{steps}  reward {shown(m, 'reward/mean', '.3f')}{held}  {judge}kl {shown(m, kl, '.4f')}  "
        f"entropy {shown(m, 'entropy', '.3f')}  {critic or 'signal ' + shown(m, 'group/signal_frac', '.2f')}  "
        f"clip {shown(m, 'clip/frac', '.3f')}  "
        f"mismatch {shown(m, 'mismatch/abs_mean', '.1e')}  len {m['len/mean']:.1f}  "
        f"{shown(m, 'tokens_per_s/rollout', '.0f')}+{shown(m, 'tokens_per_s/train', '.0f')} tok/s  "
        f"{m['memory/peak_gb']:.1f} GB"
    )


def prepare_policy(
    kind: type[PolicyTrainer], config: PolicyConfig, display: Display, task: Task | None = None
) -> PolicyTrainer:
    """All that comes before the first step."""
    given, task = task is not None, task or parse_task(config.task)
    stored = read_triples(config.data) if config.data else []
    data = [task.train, task.heldout, *([contents(stored)] if stored else [])]
    run = Run(config.out, identity(config, data), config.resume)
    run.resumable = not given
    show_notes(task, display)
    trainer = kind(config, run, display, task, stored)
    drift = trainer.stored.logprobs if trainer.stored else trainer.model.dtype != torch.float32
    if said := without_effect(config, drift):
        display.line(f"without effect in this run: {'; '.join(said)}")
    return trainer


def train_policy(
    kind: type[PolicyTrainer], config: PolicyConfig, display: Display | None = None, task: Task | None = None
) -> Path:
    """A whole run, from its config or from its last checkpoint; returns the folder of the trained model."""
    display = display or Display()
    trainer = prepare_policy(kind, config, display, task)
    run = trainer.run
    show_disk(trainer.disk(), display)
    if run.start == 0:
        display.example(trainer.example())
    alarms = Alarms(run.logged())  # a resumed run knows what it knew
    if run.start == 0:
        before = trainer.evaluate(first=True)
        display.line(f"before: held-out {before['eval/mean']:.3f} (greedy {before['eval/greedy']:.3f})")

    def step(number: int) -> dict[str, float]:
        metrics = trainer.step(number)
        if number == 0:  # only now: a run whose first step fails leaves no folder
            run.log(0, before)
            alarms.update({"step": 0, **before})
        metrics |= trainer.evaluate() if due(number + 1, config.steps, config.eval_every) else {}
        for sentence in alarms.update({"step": number + 1, **metrics}):
            display.line(f"step {number + 1}: {sentence}")
        return metrics | {"alarms": alarms.in_force}

    def line(done: int, metrics: dict[str, float]) -> str:
        return step_line(done, config.steps, metrics)

    loop(run, "step", config.steps, config.save_every, display, step, line, trainer.save)
    if config.refresh.every:
        reward = trainer.judges[0].reward
        run.finish(reward.model, reward.tokenizer, REWARD_MODEL)
    return run.finish(trainer.model, trainer.tokenizer)
