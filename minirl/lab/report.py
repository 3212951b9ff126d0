"""Draw a run: curves over its steps, and one page with numbers, warnings and sampled completions.

Everything is read from the run folder, so a run that is still going, was killed, or came from elsewhere has one too.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from minirl.errors import InputError
from minirl.files import read_json, write_atomic
from minirl.lab.alarms import Alarms

Records = list[dict]  # lines of metrics.jsonl


def read_metrics(folder: str | Path) -> Records:
    """Read a run's metrics.jsonl, but for a last line that was cut off."""
    file = Path(folder) / "metrics.jsonl"
    if records := _read_lines(file):
        return records
    raise InputError(f"{file} holds no finished step: wait for the first one, or check the folder")


def _read_lines(file: Path) -> Records:
    try:
        lines = file.read_bytes().split(b"\n")  # not splitlines: a completion may hold other line ends
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give the folder of a run") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line or b"{}")
            whole = isinstance(record["step"], int)
        except (ValueError, TypeError, KeyError):  # bad JSON or UTF-8, no object, no step
            whole = False
        if whole:
            records.append(record)
        elif line and number < len(lines):  # the last one has no line end: its writer was stopped in the middle
            raise InputError(f"{file}, line {number}: not a JSON object with a whole 'step': remove the line")
    return records


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps in which a metric has a finite value, and these values."""
    pairs = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float) and np.isfinite(r[name])]
    return np.array([step for step, _ in pairs], dtype=int), np.array([value for _, value in pairs], dtype=float)


def matching(pattern: str, *runs: Records) -> list[str]:
    """Return the metrics whose whole name matches, in the order of their first appearance."""
    names = dict.fromkeys(name for records in runs for record in records for name in record)
    return [name for name in names if re.fullmatch(pattern, name)]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the centred running mean, over fewer values at the ends."""
    kernel = np.ones(max(1, min(width, len(values))))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


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

    def lines(self, runs: Sequence[Records]) -> dict[str, str]:
        """Return metric -> label of the lines to draw; the only part of a reward, equal to its total, is left out."""
        found, total = {}, [series(records, "reward/mean")[1].tolist() for records in runs]
        for pattern, label in self.names.items():
            for name in matching(pattern, *runs):
                values = [series(records, name)[1].tolist() for records in runs]
                different = {value for run in values for value in run}
                repeated = pattern == PARTS and values == total
                if len(different) > (0 if self.steady else 1) and not repeated:
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
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # told apart by everybody
STYLES, GREY = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1))), "#666666"


def plot(folders: Sequence[str | Path], png: str | Path, labels: Sequence[str] | None = None) -> Path:
    """Draw one run, or several into the same panels, and write the picture to `png`."""
    names = labels or [str(folder) for folder in folders]
    if not folders or len(names) != len(folders):
        raise InputError(f"{len(folders)} runs and {len(names)} labels to plot: give a label for each run")
    figure = draw([read_metrics(folder) for folder in folders], names)
    if len(names) == 1:
        figure.suptitle(_literal(names[0]), x=0.01, ha="left", fontsize=12, weight="bold")
    write_atomic(png, lambda staging: figure.savefig(staging, format="png"))
    return Path(png)


def draw(runs: Sequence[Records], labels: Sequence[str]) -> Figure:
    """Draw every panel that has data, three a row."""
    shown = [(panel, lines) for panel in PANELS if (lines := panel.lines(runs))]
    if not shown:
        raise InputError(f"{', '.join(labels)}: no metric here that a plot shows, check metrics.jsonl")
    rows, columns = -(-len(shown) // 3), min(3, len(shown))
    figure = Figure(figsize=(4 * columns, 0.5 + 2.4 * rows), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    width = max(map(len, runs)) // 20
    for i, (panel, lines) in enumerate(shown, 1):
        _draw_panel(figure.add_subplot(rows, columns, i), panel, lines, runs, width)
    if len(runs) > 1:
        handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2) for i in range(len(runs))]
        fit = max(1, 45 * columns // (6 + max(map(len, labels))))
        figure.legend(handles, map(_literal, labels), loc="outside upper left", ncols=fit, frameon=False, fontsize=10)
    if width > 1:
        figure.supxlabel(f"faint: each step   full: mean of {width} steps", x=0.99, ha="right", fontsize=8, color=GREY)
    return figure


def _draw_panel(axes: Axes, panel: Panel, lines: dict[str, str], runs: Sequence[Records], width: int) -> None:
    several, handles = len(runs) > 1, []
    for k, name in enumerate(lines):
        colour, style = COLOURS[k % len(COLOURS)], STYLES[k % len(STYLES)] if several else "-"
        handles.append(Line2D([], [], color=GREY if several else colour, ls=style, lw=1.4))
        for i, records in enumerate(runs):
            look = {"color": COLOURS[i % len(COLOURS)] if several else colour, "ls": style}
            steps, values = series(records, name)
            sparse = panel.exact or name.startswith("eval/")  # neighbours are many steps apart
            mean = width > 1 and len(values) > 0 and not sparse
            if mean:
                axes.plot(steps, values, lw=0.6, alpha=0.15 if several else 0.3, **look)
            look |= {"marker": "o", "ms": 2.5, "clip_on": False} if panel.exact and panel.scale == "share" else {}
            axes.plot(steps, smooth(values, width) if mean else values, lw=1.1 if several else 1.6, **look)
    _dress(axes, panel, len(lines) > 1)
    axes.set_xlim(0, max(record["step"] for records in runs for record in records) or 1)
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


def report(folder: str | Path) -> Path:
    """Write report.html, a page that needs nothing else, into the folder of a run."""
    folder, buffer = Path(folder), io.BytesIO()
    records = read_metrics(folder)
    config = read_json(file) if (file := folder / "config.json").exists() else {}
    completions = _read_lines(file) if (file := folder / "completions.jsonl").exists() else []
    draw([records], [str(folder)]).savefig(buffer, format="png")
    picture, name = base64.b64encode(buffer.getvalue()).decode(), escape("/".join(folder.resolve().parts[-2:]))
    about = " · ".join(str(config[key]) for key in ("model", "task", "preset", "data") if config.get(key))
    trouble = "".join(f"<li>{escape(sentence)}</li>" for sentence in Alarms(records).summary())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style></head><body>
<h1>{name}</h1><p>{escape(about)}</p><p class="headline">{escape(_headline(records))}</p>
{f"<h2>Warnings</h2><ul>{trouble}</ul>" if trouble else ""}
<h2>Curves</h2><img alt="curves over the steps" src="data:image/png;base64,{picture}">
<h2>Numbers</h2>{_table(("", "", "first steps", "last steps", ""), _numbers(records))}
{_samples(completions)}
<h2>Config</h2><div class="config">{_table((), _flat(config))}</div></body></html>
"""
    # "replace", as sampled text may hold half of a surrogate pair
    write_atomic(folder / "report.html", lambda staging: staging.write_text(page, "utf-8", "replace"))
    return folder / "report.html"


def _headline(records: Records) -> str:
    """Say held-out accuracy before and after, and what it was measured on."""
    steps, values = series(records, "eval/mean")
    if not len(steps):
        steps, values = series(records, "eval/accuracy")
        found = f": held-out pairs in the right order {values[0]:.1%} → {values[-1]:.1%}" if len(steps) else ""
        return f"{records[-1]['step']} steps{found}"
    latest = {name: value for record in records for name, value in record.items()}
    measured = f"mean of {latest.get('eval/samples')} samples for each of {latest.get('eval/prompts')} prompts"
    return f"held-out accuracy {values[0]:.1%} → {values[-1]:.1%} at step {steps[-1]} ({measured})"


def _numbers(records: Records) -> list[tuple]:
    """Return a row for each curve: means over the first and the last tenth of its values."""
    rows = []
    for panel in PANELS:
        for name, label in (lines := panel.lines([records])).items():
            values = series(records, name)[1]
            n, share = max(1, len(values) // 10), panel.scale == "share"
            means = (f"{mean:.1%}" if share else mean for mean in (values[:n].mean(), values[-n:].mean()))
            rows.append((panel.title, label if len(lines) > 1 else "", *means, panel.unit))
    return rows


def _samples(completions: Records) -> str:
    """Write a table of the completions of the first, the middle and the last step that has some."""
    steps = sorted({record["step"] for record in completions})
    chosen = [r for r in completions if r["step"] in (steps[0], steps[len(steps) // 2], steps[-1])]
    names = dict.fromkeys(name for record in chosen for name in ("step", "prompt", "completion", "reward", *record))
    return "<h2>Completions</h2>" + _table(names, [[r.get(n) for n in names] for r in chosen]) if chosen else ""


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
