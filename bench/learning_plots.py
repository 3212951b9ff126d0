"""Draw the results of `bench.learning`: learning curves, gains of the methods, reward models against the rule."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = {"reinforce": ("REINFORCE", "#0072b2"), "grpo": ("GRPO", "#d55e00"), "ppo": ("PPO with a critic", "#009e73")}
JUDGED = "ppo, reward model"
FROZEN, ONLINE = "grpo, reward model", "grpo, online reward model"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"


def series(lab, seed: int, name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of a metric in a run."""
    records = map(json.loads, (lab.folder(seed, name) / "metrics.jsonl").read_text().splitlines())
    pairs = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=float)


def curves(axes, lab, seeds: Sequence[int], name: str, metric: str, label: str, colour: str, width: int = 1) -> None:
    """Draw a thin line for each seed and a thick one for their mean, smoothed over `width` steps."""
    found = [series(lab, seed, name, metric) for seed in seeds]
    steps = sorted(set.intersection(*(set(x.tolist()) for x, _ in found)))
    rows = [[dict(zip(x.tolist(), y.tolist(), strict=True))[step] for step in steps] for x, y in found]
    kernel = np.ones(width)
    norm = np.convolve(np.ones(len(steps)), kernel, "same")
    rows = [np.convolve(row, kernel, "same") / norm for row in rows]
    for row in rows:
        axes.plot(steps, row, color=colour, lw=0.7, alpha=0.4)
    axes.plot(steps, np.mean(rows, 0), color=colour, lw=2.2, label=label)


def draw(lab, seeds: Sequence[int], names: Sequence[str], lines: list[dict], out: Path) -> Iterator[Path]:
    """Draw every picture for which the needed methods were run; yield the files."""
    if set(CURVES) <= set(names):
        figure, axes = plt.subplots(figsize=(7, 4.2))
        for name, (label, colour) in CURVES.items():
            curves(axes, lab, seeds, name, "eval/mean", label, colour)
        _finish(axes, "step (32 prompts x 8 completions)", "held-out accuracy, mean of 4 samples")
        yield _save(figure, "Same start, same task: thin lines are seeds, thick ones their mean", out / "learning.png")
    yield methods(lines, out / "learning_methods.png")
    if JUDGED in names:
        yield judged(lab, seeds, out / "learning_reward_model.png")
    if {FROZEN, ONLINE} <= set(names):
        yield online(lab, seeds, out / "learning_online_reward_model.png")


def online(lab, seeds: Sequence[int], file: Path) -> Path:
    """Draw a frozen reward model beside one that is refreshed: its accuracy, and the policy's accuracy by the rule."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, label, colour in ((FROZEN, "frozen", ORANGE), (ONLINE, "refreshed every 4 steps", BLUE)):
        curves(left, lab, seeds, name, "reward_model/accuracy", label, colour, width=9)
        curves(right, lab, seeds, name, "reward/correct", label, colour, width=9)
    left.axhline(0.5, color=GREY, lw=0.8, ls=":")
    _finish(left, "step", "right above wrong, of fresh samples of one prompt")
    _finish(right, "step", "right by the rule")
    return _save(figure, "GRPO against a reward model, frozen or learning on (means of 9 steps; thin: seeds)", file)


def judged(lab, seeds: Sequence[int], file: Path) -> Path:
    """Draw PPO with a learned reward only: the reward model's score, and accuracy by the rule, which the policy never
    sees."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    metric = next(name for name in _names(lab, seeds[0], JUDGED) if name.startswith("reward/model:"))
    for seed in seeds:
        own = next(name for name in _names(lab, seed, JUDGED) if name.startswith("reward/model:"))
        left.plot(*series(lab, seed, JUDGED, own), color=ORANGE, lw=1, label="reward model" if own == metric else None)
    _finish(left, "step", "mean score of the samples", share=False)
    curves(right, lab, seeds, JUDGED, "eval/mean", "held-out sums", BLUE)
    curves(right, lab, seeds, JUDGED, "reward/correct", "samples in training", GREEN, width=5)
    _finish(right, "step", "right by the rule, which training does not see")
    return _save(figure, "PPO against a learned reward model: a line a seed, thick their mean", file)


def _names(lab, seed: int, name: str) -> list[str]:
    return list(json.loads((lab.folder(seed, name) / "metrics.jsonl").read_text().splitlines()[-1]))


def methods(lines: list[dict], file: Path) -> Path:
    """Draw a row for each method: grey marks where the seeds start, dots where they end."""
    figure, axes = plt.subplots(figsize=(7.5, 0.27 * len(lines) + 1.2))
    for y, line in enumerate(reversed(lines)):
        start, colour = np.mean(line["before"]), GREY if line["why"] else BLUE
        axes.plot([start, np.mean(line["after"])], [y, y], color=colour, lw=1, alpha=0.5)
        axes.plot(line["before"], [y] * len(line["before"]), "|", color=GREY, ms=7)
        axes.plot(line["after"], [y] * len(line["after"]), "o", color=colour, ms=4)
    axes.set_yticks(range(len(lines)), [line["method"] for line in reversed(lines)], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(-0.7, len(lines) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("held-out accuracy, mean of 8 samples: | before, dots after (a dot a seed)")
    return _save(figure, "Every algorithm from the same start", file)


def _finish(axes, x: str, y: str, share: bool = True) -> None:
    axes.set(xlabel=x, ylabel=y)
    if share:
        axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _save(figure, title: str, file: Path) -> Path:
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file
