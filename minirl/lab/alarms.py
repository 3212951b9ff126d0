"""Raise alarms about a run from its metrics, while it goes on.

`Alarms` is an observer of a `Run`; a report gives it the lines of metrics.jsonl instead. It keeps the first and the
last WINDOW values of each metric, so a step costs the same however long the run.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from minirl.run import Observer

# Steps. From one step to the next means of 128 completions scatter (SmolLM2 on sums: lengths by 3 %, entropy by 15 %,
# shares and rewards by 0.03 to 0.08); those of ten steps by a third of that, while what goes wrong takes tens of steps.
# As long must an alarm be quiet before it can be raised anew.
WINDOW = 10

DRIFTS = (  # metric, what is wrong with a, its first values, and b, its last; the sentence
    # Reasoning that pays grows answers slowly; twice the length within a run is worth a look, and so is a third of it.
    (
        "len/mean",
        lambda a, b: b > 2 * a and b > a + 2,
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
        lambda a, b: b > a + 0.1 or b > max(0.5, a - 0.1),
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
        lambda a, b: b > 2 * a or b < a / 2,
        "Reward model scores spread {b:.2g}, {a:.2g} at first: compare them with the rule.",
    ),
    # Of the order of 1e-3 in bf16 and 1e-6 in fp32; 0.05 is a quarter of what a clip of 0.2 lets a ratio move.
    (
        "mismatch/abs_mean",
        lambda a, b: b > 0.05,
        "Sampler and trainer differ by {b:.2f} a token: check dtype; of stored completions it is their age, take tis.",
    ),
)


class Ends:
    """Keep the first and the last WINDOW values of a metric."""

    def __init__(self):
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=WINDOW)

    def add(self, value: float) -> None:
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.last.append(value)

    @property
    def means(self) -> tuple[float, float]:
        """Return the means of the first and the last values; NaN, which raises no alarm, until there are WINDOW."""
        return (fmean(self.first), fmean(self.last)) if len(self.last) == WINDOW else (math.nan, math.nan)


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

    def add(self, record: dict, rewards: Sequence[float]) -> None:
        """Take in an evaluation and the rewards of the steps before it."""
        step, accuracy = record["step"], record["eval/mean"]
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
        if risen and pair < self.best - self._noise(record):
            self.sentence = (
                f"Held-out accuracy fell from {self.best:.0%} to {pair:.0%} after step {self.best_step} while the "
                f"reward rose from {self.best_reward:.2f} to {reward:.2f}: it is being hacked; read what is paid best."
            )

    def _noise(self, record: dict) -> float:
        """Return the largest fall of accuracy that may be chance: three standard errors of an evaluation, and more the
        more evaluations there were to take the best of; at least 5 points.

        One standard error is also that of the difference of two pairs, as the prompts are the same each time. Together
        with the scatter of the rewards fewer than 1 of 100 flat runs of 100 evaluations raise the alarm.
        """
        samples = record.get("eval/prompts", math.inf) * record.get("eval/samples", 1)
        error = math.sqrt(max(0.0, self.best * (1 - self.best)) / samples)
        return max(0.05, math.sqrt(9 + 2 * math.log(self.count)) * error)


@dataclass
class Alarm:
    sentence: str  # as of the last step at which it held
    first: int  # step
    last: int


class Alarms(Observer):
    """Hold the alarms of a run: those in force, and those that are over."""

    def __init__(self, records: Iterable[dict] = ()):
        self.step = 0
        self.ends: dict[str, Ends] = {}
        self.watched: list[tuple[str, tuple]] = []  # metrics of this run and the rows of DRIFTS that are about them
        self.heldout = HeldOut()
        self.raised: dict[str, Alarm] = {}  # by name, also those that are over
        for record in records:
            self.update(record)

    def after(self, step) -> dict[str, int]:
        """Say which alarms a step of a `Run` raises; return how many are in force."""
        if not self.ends:  # a resumed run knows what it knew
            for record in step.run.logged():
                self.update(record)
        for sentence in self.update({"step": step.done, **step.metrics}):
            step.run.display.line(f"step {step.done}: {sentence}")
        return {"alarms": self.in_force}

    def update(self, record: dict) -> list[str]:
        """Take in the metrics of a step; return a sentence for each alarm that is new, or back after WINDOW quiet
        steps."""
        self.step, new = record["step"], []
        self._keep(record)
        for key, sentence in self._holding():
            alarm = self.raised.get(key)
            if alarm is None or not self._in_force(alarm):
                new.append(sentence)
            self.raised[key] = Alarm(sentence, alarm.first if alarm else self.step, self.step)
        return new

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

    def _keep(self, record: dict) -> None:
        for name, value in record.items():
            if _is_number(value):
                if name not in self.ends:
                    self.ends[name] = Ends()
                    self.watched += [(name, row) for row in DRIFTS if re.fullmatch(row[0], name)]
                self.ends[name].add(value)
        if _is_number(record.get("eval/mean")):
            self.heldout.add(record, self.ends["reward/mean"].last if "reward/mean" in self.ends else ())

    def _means(self, name: str) -> tuple[float, float]:
        return self.ends[name].means if name in self.ends else (math.nan, math.nan)

    def _holding(self) -> Iterator[tuple[str, str]]:
        """Yield a name and a sentence for everything that is wrong at this step."""
        for name, (_, wrong, sentence) in self.watched:
            a, b = self._means(name)
            if wrong(a, b):
                yield name + sentence, sentence.format(name=name, a=a, b=b)
        yield from self._entropy()
        yield from self._signal()
        yield from self._kl("kl_ref/k3")
        # Of all tokens it may be unknown in some steps.
        yield from self._kl("trained/kl_old/k3" if "trained/kl_old/k3" in self.ends else "kl_old/k3")
        if self.heldout.sentence:
            yield "hacked", self.heldout.sentence

    def _entropy(self) -> Iterator[tuple[str, str]]:
        """Find a policy that stopped exploring: entropy fell, and neither the reward nor held-out accuracy has come
        half the way to the best, so that success is not the reason."""
        (a, b), (before, now), (_, best) = map(self._means, ("entropy", "reward/mean", "reward/max"))
        stuck = now < (before + best) / 2 and not self.heldout.last > (self.heldout.first + 1) / 2
        if b < a / 10 and stuck:
            what = "it tries nothing new; lower lr, or give loss.entropy_coef."
            yield "entropy", f"Entropy fell from {a:.2f} to {b:.3f} and the reward is far from the best: {what}"

    def _signal(self) -> Iterator[tuple[str, str]]:
        """Find groups that were sampled for nothing: nine of ten, most of them not solved, or all for any reason."""
        signal, right, wrong = (self._means(f"group/{x}_frac")[1] for x in ("signal", "all_correct", "all_wrong"))
        if signal == 0 or (signal < 0.1 and right <= 0.5):
            shares = f" ({right:.0%} all right, {wrong:.0%} all wrong)" if right == right else ""
            what = "harder prompts, or stop" if right > 0.5 else "easier prompts, or more completions of each"
            what = "easier or harder prompts" if math.isnan(right) else what
            yield "signal", f"{signal:.0%} of the groups had a signal in {WINDOW} steps{shares}: take {what}."

    def _kl(self, name: str) -> Iterator[tuple[str, str]]:
        """Find a KL that jumped: in two of the last three steps, as single ones spike, it is far above the others, or
        above 2 nats a token, where two policies share little."""
        values = list(self.ends[name].last) if name in self.ends else []
        if len(values) == WINDOW and (peak := median(values[-3:])) > min(2, max(0.3, 8 * median(values))):
            yield name, f"The KL ({name}) jumped to {peak:.2g}: lower lr or clip_norm."


def _is_number(value: object) -> bool:
    """Tell whether a metric has a value: NaN in the run is null in metrics.jsonl, and both are none."""
    return isinstance(value, int | float) and math.isfinite(value)
