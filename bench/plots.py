"""Plot time and memory against the vocabulary and the rows: a line for each rival, the measured limit dashed."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"minirl": "#d1495b", "minirl in place": "#edae49", "eager": "#3d5a80", "Liger": "#00798c", "TRL": "#8a6fb0"}
AXES = {"by_vocab": ("vocab", "vocabulary V"), "by_rows": ("rows", "rows N")}


def draw(records: list[dict], axis: str, title: str, path: Path) -> None:
    """Draw a column for each operation: time in the upper row, peak memory beyond the inputs in the lower one; both
    axes are logarithmic."""
    operations = list(dict.fromkeys(r["operation"] for r in records))
    figure, panels = plt.subplots(2, len(operations), figsize=(5.5 * len(operations), 7), sharex=True, squeeze=False)
    for column, name in zip(panels.T, operations, strict=True):
        own = sorted((r for r in records if r["operation"] == name), key=lambda r: r["shape"][AXES[axis][0]])
        x = [r["shape"][AXES[axis][0]] for r in own]
        column[0].plot(x, [r["limit_seconds"] * 1e3 for r in own], "k--", lw=1, label="limit of the device")
        for rival in own[0]["rivals"]:
            for panel, y in zip(column, zip(*(_numbers(r, rival) for r in own), strict=True), strict=True):
                if any(v is not None for v in y):
                    y = [float("nan") if v is None else v for v in y]
                    panel.plot(x, y, "o-", ms=4, lw=1.5, color=COLOURS.get(rival), label=rival)
        column[0].set_title(own[0]["title"], fontsize=10)
        for panel, label in zip(column, ("milliseconds", "peak MB above the inputs"), strict=True):
            panel.set(xscale="log", yscale="log", ylabel=label)
            panel.grid(alpha=0.3, which="both", lw=0.5)
            panel.set_xticks(x, [f"{v:,}" for v in x], rotation=20)
            panel.set_xticks([], minor=True)
        column[1].set_xlabel(AXES[axis][1])
        column[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _numbers(record: dict, rival: str) -> tuple[float | None, float | None]:
    """Return milliseconds and megabytes, at least 0.1 MB: less cannot be measured, and a logarithmic axis has no 0."""
    numbers = record["rivals"].get(rival, {})
    if "seconds" not in numbers:
        return None, None
    memory = numbers["memory"]
    return numbers["seconds"]["median"] * 1e3, None if isinstance(memory, str) else max(memory / 1e6, 0.1)
