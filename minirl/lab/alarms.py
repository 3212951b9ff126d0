"""Raise alarms about a run from its metrics, while it goes on.

`Alarms` is an observer of a `Run`; a report gives it the lines of metrics.jsonl instead. It keeps the first and the
last WINDOW values of each metric that it watches, so a step costs the same however long the run. Steps are taken in
one at a time or in blocks, in which numpy works on all of them at once: those of a long run in a second.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from minirl.lab.logs import Columns, read_columns
from minirl.run import Observer

# Steps. From one step to the next means of 128 completions scatter (SmolLM2 on sums: lengths by 3 %, entropy by 15 %,
# shares and rewards by 0.03 to 0.08); those of ten steps by a third of that, while what goes wrong takes tens of steps.
# As long must an alarm be quiet before it can be raised anew.
WINDOW = 10

DRIFTS = (  # metric; what is wrong with a, the mean of its first values, and b, those of its last [N]; the sentence
    # Reasoning that pays grows answers slowly; twice the length within a run is worth a look, and so is a third of it.
    (
        "len/mean",
        lambda a, b: (b > 2 * a) & (b > a + 2),
        "Completions grew from {a:.0f} to {b:.0f} tokens: read some; where length itself pays set overlong_cache.",
    ),
    (
        "len/mean",
        lambda a, b: b < a / 3,
        "Completions shrank from {a:.0f} to {b:.0f} tokens: read some; is the work still done, or only an answer said?",
    ),
    # A policy that learns gets surer; one that gets less sure is on its way to noise. 0.3 nats where it started low.
    (
        "entropy",
        lambda a, b: b > max(2 * a, a + 0.3),
        "Entropy rose from {a:.2f} to {b:.2f}: the policy falls apart; lower lr, or give a KL to the reference.",
    ),
    # Ten points are twice what ten steps of 32 completions scatter; where every second is cut off it needs no rise, and
    # a clear fall is good news.
    (
        "truncated_frac",
        lambda a, b: (b > a + 0.1) | (b > max(0.5, a - 0.1)),
        "{b:.0%} are cut off, {a:.0%} at first: raise max_tokens, or set overlong_cache or truncation.",
    ),
    # Shares that are nearly 0 in a run that learns, so ten points more are no scatter.
    (
        "repetition_frac",
        lambda a, b: b > a + 0.1,
        "{b:.0%} go round in loops, {a:.0%} at first: read some, and give the reward repetition a weight.",
    ),
    (
        "reward/.*repetition.*",
        lambda a, b: b < a - 0.1,
        "Looping: {name} fell from {a:.2f} to {b:.2f}: read some completions.",
    ),
    (
        "too_short_frac",
        lambda a, b: b > a + 0.1,
        "{b:.0%} say nothing, {a:.0%} at first: silence must not pay; give the reward too_short a negative weight.",
    ),
    # One answer in twenty that cannot be read is a reference or a reward that is wrong.
    (
        "reward/unscored_frac",
        lambda a, b: b > 0.05,
        "{b:.0%} of the completions cannot be scored: check the rewards.",
    ),
    (
        "(late|unusable)_frac",
        lambda a, b: b > 0.05,
        "{b:.0%} have a reward that is late, or none because it failed: read faults.jsonl ({name}).",
    ),
    # Below 0.6 a model hardly tells two answers apart, beyond 10 its scores are far from where training left them; ten
    # points and a factor of two it loses on texts that are no longer those it learned from.
    (
        "reward_model/accuracy",
        lambda a, b: b < max(0.6, a - 0.1),
        "The reward model ranks {b:.0%} right, {a:.0%} at first: set refresh.every, or end the run.",
    ),
    (
        "reward_model/mean",
        lambda a, b: abs(b) > 10,
        "The reward model gives {b:.1f} on average: it no longer knows what it scores; set refresh.every, or more KL.",
    ),
    (
        "reward_model/std",
        lambda a, b: (b > 2 * a) | (b < a / 2),
        "Reward model scores spread {b:.2g}, {a:.2g} at first: compare them with the rule.",
    ),
    # Of the order of 1e-3 in bf16 and 1e-6 in fp32; 0.05 is a quarter of what a clip of 0.2 lets a ratio move.
    (
        "mismatch/abs_mean",
        lambda a, b: b > 0.05,
        "Sampler and trainer differ by {b:.2f} a token: check dtype; of stored completions it is their age, take tis.",
    ),
)


OTHERS = r"entropy|eval/(mean|prompts|samples)|reward/(mean|max)|(kl_ref|(trained/)?kl_old)/k3|group/\w+_frac"
WATCHED = re.compile("|".join([OTHERS, *(metric for metric, _, _ in DRIFTS)]))


class Ends:
    """Keep the first and the last WINDOW values of a metric; within a block the last ones as of each of its N steps."""

    def __init__(self):
        self.first: list[float] = []
        self.values = np.empty(0)  # the last ones before the block, then its own

    def add(self, block: np.ndarray) -> None:
        """Take in the values of N steps [N]; one that is NaN is none."""
        before, own = self.values[-WINDOW:], block == block
        self.values = np.concatenate([before, block[own]])
        self.counts = len(before) + np.cumsum(own)  # [N], how many of `values` there are as of each step
        self.first += self.values[len(before) :][: WINDOW - len(self.first)].tolist()
        self.mean = self.of_last(lambda windows: windows.mean(1))

    def last(self, step: int) -> list[float]:
        """Return the last values as of a step of the block."""
        return self.values[: self.counts[step]][-WINDOW:].tolist()

    def of_last(self, statistic: Callable[[np.ndarray], np.ndarray], count: int = WINDOW) -> np.ndarray:
        """Return a statistic of the last `count` values as of each step [N]; NaN, which raises no alarm, until there
        are WINDOW."""
        found, enough = np.full(len(self.counts), math.nan), self.counts >= WINDOW
        if enough.any():
            found[enough] = statistic(self.values[self.counts[enough, None] - np.arange(count, 0, -1)])
        return found


def medians(windows: np.ndarray) -> np.ndarray:
    count = windows.shape[1]
    return np.sort(windows, 1)[:, (count - 1) // 2 : count // 2 + 1].mean(1)


@dataclass
class HeldOut:
    """Follow held-out accuracy: the first, the last, and the best mean of two evaluations in a row with the reward of
    that time."""

    first: float = math.nan
    last: float = math.nan
    last_step: int = 0
    best: float = -math.inf
    best_step: int = 0
    best_reward: float = math.nan
    best_error: float = math.nan  # its standard error
    count: int = 0
    lowest_reward: float = math.inf
    highest_reward: float = -math.inf
    sentence: str = ""  # as of the last evaluation

    @property
    def is_solved(self) -> bool:
        """Tell whether accuracy has come half the way from the first to 1."""
        return self.last > (self.first + 1) / 2

    def add(self, step: int, accuracy: float, completions: float, rewards: Sequence[float]) -> None:
        """Take in an evaluation, of how many completions it is, and the rewards of the steps before it."""
        since = list(rewards)[-max(3, step - self.last_step) :]  # those that this evaluation and the one before enclose
        reward = fmean(since) if since else math.nan
        error = stdev(since) / math.sqrt(len(since)) if len(since) > 1 else math.nan
        pair = (self.last + accuracy) / 2
        self.first = accuracy if math.isnan(self.first) else self.first
        self.last, self.last_step, self.count = accuracy, step, self.count + 1
        if pair >= self.best:
            self.best, self.best_step, self.best_reward, self.best_error = pair, step, reward, error
        self.lowest_reward, self.highest_reward = min(self.lowest_reward, reward), max(self.highest_reward, reward)
        scatter = 2 * math.hypot(error, self.best_error)
        risen = reward - self.best_reward > max(0.05 * (self.highest_reward - self.lowest_reward), scatter)
        self.sentence = ""
        if risen and pair < self.best - self._noise(completions):
            self.sentence = (
                f"Held-out accuracy fell from {self.best:.0%} to {pair:.0%} after step {self.best_step} while the "
                f"reward rose from {self.best_reward:.2f} to {reward:.2f}: it is being hacked; read what is paid best."
            )

    def _noise(self, completions: float) -> float:
        """Return the largest fall of accuracy that may be chance: three standard errors of an evaluation, and more the
        more evaluations there were to take the best of; at least 5 points.

        One standard error is also that of the difference of two pairs, as the prompts are the same each time. Together
        with the scatter of the rewards fewer than 1 of 100 flat runs of 100 evaluations raise the alarm.
        """
        error = math.sqrt(max(0.0, self.best * (1 - self.best)) / completions)
        return max(0.05, math.sqrt(9 + 2 * math.log(self.count)) * error)


@dataclass
class Alarm:
    sentence: str  # as of the last step at which it held
    first: int  # step
    last: int


class Alarms(Observer):
    """Hold the alarms of a run: those in force, and those that are over."""

    def __init__(self, run: Columns | None = None):
        self.step = 0
        self.ends: dict[str, Ends] = {}  # of the metrics that are watched
        self.watched: list[tuple[str, tuple]] = []  # metrics of this run and the rows of DRIFTS that are about them
        self.heldout = HeldOut()
        self.raised: dict[str, Alarm] = {}  # by name, also those that are over
        if run:
            self._follow(run)

    def _follow(self, run: Columns) -> None:
        for block in run.blocks():
            self.read(block)

    def after(self, step) -> dict[str, int]:
        """Say which alarms a step of a `Run` raises; return how many are in force."""
        file = step.run.out / "metrics.jsonl"
        if not self.ends and file.exists():  # a resumed run knows what it knew
            self._follow(read_columns(file, WATCHED, []))
        for sentence in self.update({"step": step.done, **step.metrics}):
            step.run.display.line(f"step {step.done}: {sentence}")
        return {"alarms": self.in_force}

    def update(self, record: dict) -> list[str]:
        """Take in the metrics of a step; return a sentence for each alarm that is new, or back after WINDOW quiet
        steps."""
        self.step = record["step"]
        known = {key for key, alarm in self.raised.items() if self._in_force(alarm)}
        return [self.raised[key].sentence for key in self.read(Columns.of([record])) if key not in known]

    def read(self, block: Columns) -> list[str]:
        """Take in the metrics of N steps; return the names of the alarms that held in one of them."""
        self._keep(block)
        held = [(np.flatnonzero(wrong), key, sentence) for key, wrong, sentence in self._holding() if wrong.any()]
        for at, key, sentence in sorted(held, key=lambda found: found[0][0]):  # in the order in which they came
            first = self.raised[key].first if key in self.raised else int(block.steps[at[0]])
            self.raised[key] = Alarm(sentence(at[-1]), first, int(block.steps[at[-1]]))
        self.step = int(block.steps[-1])
        return [key for _, key, _ in held]

    @property
    def in_force(self) -> int:
        return sum(map(self._in_force, self.raised.values()))

    def summary(self) -> list[str]:
        """Return a sentence for every alarm of the run so far, with its steps."""
        return [
            f"{alarm.sentence} "
            + (f"Since step {alarm.first}." if self._in_force(alarm) else f"Steps {alarm.first} to {alarm.last}.")
            for alarm in self.raised.values()
        ]

    def _in_force(self, alarm: Alarm) -> bool:
        return self.step - alarm.last < WINDOW

    def _keep(self, block: Columns) -> None:
        for name in block.values:
            if name not in self.ends and WATCHED.fullmatch(name):
                self.ends[name] = Ends()
                self.watched += [(name, row) for row in DRIFTS if re.fullmatch(row[0], name)]
        for name, ends in self.ends.items():
            ends.add(block.column(name))
        self.solved = np.full(len(block.steps), self.heldout.is_solved)  # as of each step
        self.hacked = [self.heldout.sentence] * len(block.steps)
        accuracy, prompts, samples = (block.column(f"eval/{name}") for name in ("mean", "prompts", "samples"))
        completions = np.nan_to_num(prompts, nan=math.inf) * np.nan_to_num(samples, nan=1)
        for i in np.flatnonzero(~np.isnan(accuracy)):
            rewards = self.ends["reward/mean"].last(i) if "reward/mean" in self.ends else []
            self.heldout.add(int(block.steps[i]), accuracy[i].item(), completions[i].item(), rewards)
            self.solved[i:] = self.heldout.is_solved
            self.hacked[i:] = [self.heldout.sentence] * (len(self.hacked) - i)

    def _means(self, name: str) -> tuple[float, np.ndarray]:
        """Return the means of a metric's first values, and of its last as of each step."""
        if name not in self.ends:
            return math.nan, np.full(len(self.solved), math.nan)
        return fmean(self.ends[name].first or [math.nan]), self.ends[name].mean

    def _holding(self) -> Iterator[tuple[str, np.ndarray, Callable[[int], str]]]:
        """Yield for everything that can be wrong a name, in which of the N steps it is [N], and its sentence as of a
        step."""
        for name, (_, wrong, sentence) in self.watched:
            a, b = self._means(name)
            yield (
                name + sentence,
                wrong(a, b),
                lambda i, name=name, a=a, b=b, sentence=sentence: sentence.format(name=name, a=a, b=b[i]),
            )
        yield self._entropy()
        yield self._signal()
        # Of all tokens it may be unknown in some steps.
        for name in ("kl_ref/k3", "trained/kl_old/k3" if "trained/kl_old/k3" in self.ends else "kl_old/k3"):
            if name in self.ends:
                yield self._kl(name)
        yield "hacked", np.array([bool(sentence) for sentence in self.hacked]), self.hacked.__getitem__

    def _entropy(self) -> tuple[str, np.ndarray, Callable[[int], str]]:
        """Find a policy that stopped exploring: entropy fell, and neither the reward nor held-out accuracy has come
        half the way to the best, so that success is not the reason."""
        (a, b), (before, now), (_, best) = map(self._means, ("entropy", "reward/mean", "reward/max"))
        stuck = (now < (before + best) / 2) & ~self.solved
        what = "it tries nothing new; lower lr, or give loss.entropy_coef."
        return (
            "entropy",
            (b < a / 10) & stuck,
            lambda i: f"Entropy fell from {a:.2f} to {b[i]:.3f} and the reward is far from the best: {what}",
        )

    def _signal(self) -> tuple[str, np.ndarray, Callable[[int], str]]:
        """Find groups that were sampled for nothing: nine of ten, most of them not solved, or all for any reason."""
        signals, rights, wrongs = (self._means(f"group/{x}_frac")[1] for x in ("signal", "all_correct", "all_wrong"))

        def sentence(i: int) -> str:
            right = rights[i]
            shares = f" ({right:.0%} all right, {wrongs[i]:.0%} all wrong)" if right == right else ""
            what = "harder prompts, or stop" if right > 0.5 else "easier prompts, or more completions of each"
            what = "easier or harder prompts" if math.isnan(right) else what
            return f"{signals[i]:.0%} of the groups had a signal in {WINDOW} steps{shares}: take {what}."

        return "signal", (signals == 0) | ((signals < 0.1) & (rights <= 0.5)), sentence

    def _kl(self, name: str) -> tuple[str, np.ndarray, Callable[[int], str]]:
        """Find a KL that jumped: in two of the last three steps, as single ones spike, it is far above the others, or
        above 2 nats a token, where two policies share little."""
        peaks, usual = self.ends[name].of_last(medians, 3), self.ends[name].of_last(medians)
        jumped = peaks > np.minimum(2, np.maximum(0.3, 8 * usual))
        return name, jumped, lambda i: f"The KL ({name}) jumped to {peaks[i]:.2g}: lower lr or clip_norm."
