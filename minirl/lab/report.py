"""Draw a run: curves over its steps, and one page with numbers, warnings and sampled completions.

Everything is read from the run folder, so a run that is still going, was killed, or came from elsewhere has one too.
Of a long run only what is shown is in memory: eight bytes a step and curve.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minirl.errors import InputError
from minirl.files import read_json, write_atomic
from minirl.lab.alarms import WATCHED, Alarms
from minirl.lab.logs import Columns, damage, read_columns, read_completions, refuse_empty
from minirl.manifest import DIGEST

POINTS = 2000  # values of a curve; of more, several to a pixel, the extremes and the means of every few are drawn


@dataclass
class Log:
    """The part of a run that a plot and a page show."""

    metrics: Columns
    completions: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # about damaged lines


def read_log(folder: str | Path, completions: bool = True) -> Log:
    """Read what is shown of a run, with or without its completions. Damaged lines are left out, and named in notes."""
    (file, more), damaged = (Path(folder) / name for name in ("metrics.jsonl", "completions.jsonl")), ([], [])
    metrics = read_columns(file, SHOWN, damaged[0])
    if not len(metrics.steps):
        refuse_empty(file)
    chosen = read_completions(more, damaged[1]) if completions and more.exists() else []
    notes = [f"{damage(*found)}; left out" for found in zip((file, more), damaged, strict=True) if found[1]]
    return Log(metrics, chosen, notes)


# ---- plot ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Panel:
    """Describe a small plot with a line for each metric that matches one of `names` (regular expression -> label)."""

    title: str
    unit: str
    names: dict[str, str]
    scale: str = "linear"  # or log, or share: a percentage
    exact: bool = False  # drawn as it is, without a running mean
    steady: bool = True  # also show a line that never changes

    def lines(self, runs: Sequence[Columns]) -> dict[str, str]:
        """Return metric -> label of the lines to draw; the only part of a reward, equal to its total, is left out."""
        found, total = {}, [run.series("reward/mean")[1] for run in runs]
        for pattern, label in self.names.items():
            for name in dict.fromkeys(name for run in runs for name in run.values if re.fullmatch(pattern, name)):
                values = [run.series(name)[1] for run in runs]
                every = np.concatenate(values)
                repeated = pattern == PARTS and all(map(np.array_equal, values, total))
                if len(every) and (self.steady or every.min() < every.max()) and not repeated:
                    found[name] = re.fullmatch(pattern, name).expand(label)
        return found


PARTS = r"reward/(?!(?:mean|std|min|max|unscored_frac|group_std_mean)$)(.+)"
KLS = {"kl_ref/k3": "to the reference", "trained/kl_ref/k3": "trained tokens"}
KLS |= {"kl_old/k3": "to the policy before", "trained/kl_old/k3": "its trained tokens"}
PANELS = (
    Panel("Held-out accuracy", "of prompts", {"eval/(mean|greedy|(?:pass|maj)@.+)": r"\1"}, "share", exact=True),
    Panel("Reward", "mean of a step", {"reward/mean": "total", PARTS: r"\1"}),
    Panel("Loss", "", {"loss": "loss"}),
    Panel("Accuracy", "of pairs", {"accuracy": "training", "eval/accuracy": "held-out"}, "share"),
    Panel("Reward model", "right above wrong", {"reward_model/accuracy": "fresh pairs"}, "share"),
    Panel("KL", "nats a token", KLS, steady=False),
    Panel("Weight of the KL", "", {"beta": "weight"}, exact=True, steady=False),
    Panel("Entropy", "nats a token", {"entropy": "entropy", "trained/entropy": "of trained tokens"}),
    Panel("Completion length", "tokens", {"len/mean": "mean", "len/p95": "95th percentile"}),
    Panel("Truncated", "of completions", {"truncated_frac": "truncated"}, "share"),
    Panel("Groups with a signal", "of groups", {"group/signal_frac": "signal"}, "share"),
    Panel("Clipped", "of tokens", {"clip/frac": "all", "trained/clip/frac": "trained"}, "share", steady=False),
    Panel("Critic", "explained variance", {"value/explained_var": "explained variance"}),
    Panel("Sampler against trainer", "|Δ log p|", {"mismatch/abs_mean": "mean", "mismatch/abs_max": "largest"}, "log"),
    Panel("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    Panel("Learning rate", "", {"lr": "learning rate"}, exact=True, steady=False),
    Panel("Speed", "tokens/s", {"tokens_per_s/(.+)": r"\1"}),
)
EVALUATED = "eval/(?:mean|accuracy|samples|prompts)"  # for the headline
SHOWN = re.compile(
    "|".join(f"(?:{name})" for name in (EVALUATED, WATCHED.pattern, *(n for p in PANELS for n in p.names)))
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # told apart by everybody
STYLES, GREY = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))), "#666666"


def plot(runs: Sequence[str | Path | Log], png: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draw one run, or several into the same panels, and write the picture to `png`. A run is a folder, or a log with
    a label."""
    names = labels or [str(run) for run in runs]
    if not runs or len(names) != len(runs):
        raise InputError(f"{len(runs)} runs and {len(names)} labels to plot: give a label for each run")
    figure = draw([(run if isinstance(run, Log) else read_log(run, completions=False)).metrics for run in runs], names)
    if len(names) == 1:
        figure.suptitle(_literal(names[0]), x=0.01, ha="left", fontsize=12, weight="bold")
    write_atomic(png, lambda staging: figure.savefig(staging, format="png"))
    return Path(png)


def draw(runs: Sequence[Columns], labels: Sequence[str]) -> Figure:
    """Draw every panel that has data, three a row."""
    shown = [(panel, lines) for panel in PANELS if (lines := panel.lines(runs))]
    if not shown:
        raise InputError(f"{', '.join(labels)}: no metric here that a plot shows, check metrics.jsonl")
    rows, columns = -(-len(shown) // 3), min(3, len(shown))
    figure = Figure(figsize=(4 * columns, 0.5 + 2.4 * rows), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    longest = max(len(run.steps) for run in runs)
    width, few = longest // 20, points_a_bin(longest)
    for i, (panel, lines) in enumerate(shown, 1):
        _draw_panel(figure.add_subplot(rows, columns, i), panel, lines, runs, width)
    if len(runs) > 1:
        handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2) for i in range(len(runs))]
        fit = max(1, 45 * columns // (6 + max(map(len, labels))))
        figure.legend(handles, map(_literal, labels), loc="outside upper left", ncols=fit, frameon=False, fontsize=10)
    if width > 1:
        each = "each step" if few == 1 else f"lowest and highest of every {few} steps"
        figure.supxlabel(f"faint: {each}   full: mean of {width} steps", x=0.99, ha="right", fontsize=8, color=GREY)
    return figure


def points_a_bin(count: int) -> int:
    """Return of how many values of a curve the extremes and the mean are drawn: 1 is all of them."""
    return 1 if count <= POINTS else -(-2 * count // POINTS)


def extremes(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a curve [N]: of a long one the lowest and the highest of each bin, which look the same."""
    few = points_a_bin(len(values))
    if few == 1:
        return steps, values
    bins = np.pad(values, (0, -len(values) % few), mode="edge").reshape(-1, few)
    first = few * np.arange(len(bins))
    at = np.unique([first + bins.argmin(1), first + bins.argmax(1)])
    return steps[at], values[at]


def smooth(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the centred running mean over `width` values [N], over fewer at the ends; of a long curve
    at the middle step of each bin."""
    first = np.arange(0, len(values), few := points_a_bin(len(values)))
    sums, counts = np.add.reduceat(values, first), np.diff(first, append=len(values))
    kernel = np.ones(max(1, min(width, len(values)) // few))
    return steps[first + counts // 2], np.convolve(sums, kernel, "same") / np.convolve(counts, kernel, "same")


def _draw_panel(axes: Axes, panel: Panel, lines: dict[str, str], runs: Sequence[Columns], width: int) -> None:
    several, handles = len(runs) > 1, []
    for k, name in enumerate(lines):
        colour, style = COLOURS[k % len(COLOURS)], STYLES[k % len(STYLES)] if several else "-"
        handles.append(Line2D([], [], color=GREY if several else colour, ls=style, lw=1.4))
        for i, run in enumerate(runs):
            look = {"color": COLOURS[i % len(COLOURS)] if several else colour, "ls": style}
            steps, values = run.series(name)
            sparse = panel.exact or name.startswith("eval/")  # neighbours are many steps apart
            mean = width > 1 and len(values) > 0 and not sparse
            if mean:
                axes.plot(*extremes(steps, values), lw=0.6, alpha=0.15 if several else 0.3, **look)
            look |= {"marker": "o", "ms": 2.5, "clip_on": False} if panel.exact and panel.scale == "share" else {}
            points = smooth(steps, values, width) if mean else extremes(steps, values)
            axes.plot(*points, lw=1.1 if several else 1.6, **look)
    _dress(axes, panel, len(lines) > 1)
    axes.set_xlim(0, max(run.steps.max() for run in runs) or 1)
    if len(lines) > 1:
        names = [_literal(label if len(label) < 24 else f"…{label[-22:]}") for label in lines.values()]
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": 4, "borderaxespad": 0}
        axes.legend(handles, names, frameon=False, fontsize=7.5, handlelength=1.8, columnspacing=1.2, **place)


def _dress(axes: Axes, panel: Panel, legend: bool) -> None:
    """Set title, unit, ticks and limits of a panel."""
    axes.set_title(panel.title, loc="left", fontsize=10, weight="bold", pad=18 if legend else 8)
    axes.set_ylabel(panel.unit, fontsize=8, color=GREY)
    axes.set_xlabel("step", fontsize=8, color=GREY)
    axes.tick_params(which="both", labelsize=8, color="#bbbbbb", labelcolor="#444444", length=3)
    axes.grid(axis="y", color="#eeeeee", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    curves = [values for line in axes.lines if len(values := line.get_ydata())]
    spikes = any(0 < 50 * np.median(values) < values.max() for values in curves)
    if spikes or (panel.scale == "log" and any((values > 0).any() for values in curves)):
        axes.set_yscale("log", nonpositive="mask")
        return
    low, high = axes.get_ylim()
    percent = panel.scale == "share"
    axes.set_ylim((max(0, low), min(1.02, high)) if percent else (low, high))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%" if percent else f"{y:g}"))


def _literal(label: str) -> str:
    """Change a label that matplotlib would read as a formula, or hide."""
    return label.lstrip("_").replace("$", r"\$")


# ---- page ------------------------------------------------------------------------------------------------------------
STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: #222; max-width: 1200px; margin: auto; padding: 2em; }
h1 { font-size: 1.6em; margin-bottom: 0; }  h2 { font-size: 1.15em; margin: 2em 0 .5em; }  img { width: 100%; }
p { margin: .2em 0; color: #666; }  p.headline { color: #222; font-size: 1.1em; }  table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid #999; }  tr + tr td { border-top: 1px solid #eee; }
th, td { padding: .25em 1.2em .25em 0; vertical-align: top; }  td.number { text-align: right; }
pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: 0; max-height: 18em; overflow-y: auto; }
.config { columns: 3; font-size: 13px; }  .config td + td { text-align: left; overflow-wrap: anywhere; }
ul { background: #fff5e5; border-left: 4px solid #e69f00; padding: .7em 1em .7em 2em; }
"""


def report(folder: str | Path, log: Log | None = None) -> Path:
    """Write report.html, a page that needs nothing else, into the folder of a run, whose log may have been read."""
    folder, buffer = Path(folder), io.BytesIO()
    log = log or read_log(folder)
    config = read_json(file) if (file := folder / "config.json").exists() else {}
    config.pop(DIGEST, None)
    draw([log.metrics], [str(folder)]).savefig(buffer, format="png")
    picture, name = base64.b64encode(buffer.getvalue()).decode(), escape("/".join(folder.resolve().parts[-2:]))
    about = " · ".join(str(config[key]) for key in ("model", "task", "preset", "data") if config.get(key))
    trouble = "".join(f"<li>{escape(sentence)}</li>" for sentence in [*log.notes, *Alarms(log.metrics).summary()])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>{name}</h1><p>{escape(about)}</p><p class="headline">{escape(_headline(log.metrics))}</p>
{f"<h2>Warnings</h2><ul>{trouble}</ul>" if trouble else ""}
<h2>Curves</h2><img alt="curves over the steps" src="data:image/png;base64,{picture}">
<h2>Numbers</h2>{_table(("", "", "first steps", "last steps", ""), _numbers(log.metrics))}
{_samples(log.completions)}
<h2>Config</h2><div class="config">{_table((), _flat(config))}</div></body></html>
"""
    # "replace", as sampled text may hold half of a surrogate pair
    write_atomic(folder / "report.html", lambda staging: staging.write_text(page, "utf-8", "replace"))
    return folder / "report.html"


def _headline(run: Columns) -> str:
    """Say held-out accuracy before and after, and what it was measured on."""
    steps, values = run.series("eval/mean")
    if not len(steps):
        steps, values = run.series("eval/accuracy")
        found = f": held-out pairs in the right order {values[0]:.1%} → {values[-1]:.1%}" if len(steps) else ""
        return f"{run.steps[-1]} steps{found}"
    samples, prompts = (next(map(int, run.series(f"eval/{x}")[1][-1:]), None) for x in ("samples", "prompts"))
    measured = f"mean of {samples} samples for each of {prompts} prompts"
    return f"held-out accuracy {values[0]:.1%} → {values[-1]:.1%} at step {steps[-1]} ({measured})"


def _numbers(run: Columns) -> list[tuple]:
    """Return a row for each curve: means over the first and the last tenth of its values."""
    rows = []
    for panel in PANELS:
        for name, label in (lines := panel.lines([run])).items():
            values = run.series(name)[1]
            n, share = max(1, len(values) // 10), panel.scale == "share"
            means = (f"{mean:.1%}" if share else mean for mean in (values[:n].mean(), values[-n:].mean()))
            rows.append((panel.title, label if len(lines) > 1 else "", *means, panel.unit))
    return rows


def _samples(completions: list[dict]) -> str:
    """Write a table of completions."""
    names = dict.fromkeys(n for record in completions for n in ("step", "prompt", "completion", "reward", *record))
    rows = [[record.get(n) for n in names] for record in completions]
    return "<h2>Completions</h2>" + _table(names, rows) if rows else ""


def _table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Write an HTML table; every cell is escaped here and nowhere else."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    text = escape(_as_text(value))
    kind = ' class="number"' if isinstance(value, int | float) or re.fullmatch(r"[\d.]+%", text) else ""
    return f"<td><pre>{text}</pre></td>" if "\n" in text or len(text) > 40 else f"<td{kind}>{text}</td>"


def _as_text(value: object) -> str:
    """Write a value as a person would; chat messages as `role: content`."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and "content" in m for m in value):
        return "\n".join(f"{m.get('role', '')}: {m['content']}" for m in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
