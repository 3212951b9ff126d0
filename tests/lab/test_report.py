"""Reports on made-up run folders: what is drawn, what is warned about, and that a page carries no foreign markup."""

import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import run_of, sft_run

from minirl.errors import InputError
from minirl.files import atomic_folder
from minirl.lab import cli, logs
from minirl.lab.logs import Columns, read_columns, read_metrics
from minirl.lab.report import COLOURS, POINTS, draw, extremes, plot, read_log, report, smooth


def write(folder: Path, records: list[dict], completions: list[dict] = (), config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    for name, lines in (("metrics.jsonl", records), ("completions.jsonl", completions)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def completions_of(steps: int = 100) -> list[dict]:
    return [
        {
            "step": step,
            "prompt": [{"role": "user", "content": f"What is {step} + {j}? Think first, then answer."}],
            "completion": f"<think>\nI add {step} and {j}.\n</think>\n{step + j - step % 3}",
            "reward": float(step % 3 == 0),
            "answer": str(step + j),
            "finish_reason": "stop",
        }
        for step in range(1, steps + 1)
        for j in (7, 40)
    ]


CONFIG = {"model": "Qwen/Qwen3-0.6B", "task": "arithmetic:op=sum", "lr": 1e-6, "loss": {"kl": "k3", "kl_coef": 0.04}}
RL_PANELS = [
    "Held-out accuracy",
    "Reward",
    "KL",
    "Entropy",
    "Completion length",
    "Truncated",
    "Groups with a signal",
    "Clipped",
    "Sampler against trainer",
    "Gradient norm",
    "Speed",
]


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def drawn(runs: list[list[dict]], labels: list[str]):
    return draw([Columns.of(records) for records in runs], labels)


def legend(axes_or_figure) -> list[str]:
    return [text.get_text() for text in axes_or_figure.texts]


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_metrics_are_read_back(tmp_path):
    records = run_of(20)
    assert read_metrics(write(tmp_path / "run", records)) == records


@pytest.mark.parametrize("tail", [b'{"step": 3, "los', b'{"step": 3, "name": "\xe2\x82', b'{"st', b"3"])
def test_a_cut_off_last_line_is_left_out(tmp_path, tail):
    folder = write(tmp_path / "run", [{"step": 1}, {"step": 2}])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert [r["step"] for r in read_metrics(folder)] == [1, 2]


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", '{"loss": 1.0}', '{"step": "one"}', '{"step": 1.5}', "17", "null"])
def test_a_broken_line_is_named_with_its_file(tmp_path, line):
    folder = write(tmp_path / "run", [{"step": 1}])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(line + '\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .*: remove what is damaged$"):
        read_metrics(folder)
    log = read_log(folder)
    assert log.metrics.steps.tolist() == [1, 3]
    assert log.notes == [f"{folder}/metrics.jsonl, line 2: not a JSON object with a whole 'step'; left out"]


def test_a_folder_that_is_no_run_or_has_no_step_yet(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read \(No such file"):
        read_metrics(tmp_path)
    with pytest.raises(InputError, match="no finished step"):
        read_metrics(write(tmp_path / "run", []))


def test_unusual_line_ends_in_a_text_do_not_split_it(tmp_path):
    folder = write(tmp_path / "run", [{"step": 1}])
    (folder / "metrics.jsonl").write_text('{"step": 1, "note": "a\u2028b\x85c"}\n\n{"step": 2}\n', encoding="utf-8")
    assert [r["step"] for r in read_metrics(folder)] == [1, 2]


def test_a_series_skips_what_is_no_finite_number():
    values = [1, None, "x", float("nan"), float("inf"), 2.5, 10**400, [3]]
    steps, found = Columns.of([{"step": i, "loss": value} for i, value in enumerate(values)] + [{"step": 9}]).series(
        "loss"
    )
    assert steps.tolist() == [0, 5] and found.tolist() == [1.0, 2.5]


# ---- plot ------------------------------------------------------------------------------------------------------------


def test_a_plot_of_an_rl_run_shows_every_panel(tmp_path):
    png = plot([write(tmp_path / "run", run_of())], tmp_path / "plots" / "run.png")
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) >= 1200
    shown = panels(drawn([run_of()], ["run"]))
    assert list(shown) == RL_PANELS
    assert legend(shown["Held-out accuracy"].get_legend()) == ["mean", "greedy", "pass@8", "maj@8"]
    assert legend(shown["Reward"].get_legend()) == ["total", "correct", "format", "repetition"]
    assert shown["Sampler against trainer"].get_yscale() == "log" and shown["Speed"].get_ylabel() == "tokens/s"


def test_a_plot_of_an_sft_run_shows_loss_entropy_and_learning_rate():
    assert list(panels(drawn([sft_run()], ["sft"]))) == ["Loss", "Entropy", "Gradient norm", "Learning rate", "Speed"]


def test_panels_and_lines_without_news_are_left_out():
    gone = ("kl_old/k3", "kl_ref/k3", "clip/frac", "mismatch/abs_mean", "mismatch/abs_max", "len/p95")
    records = [{k: v for k, v in r.items() if k not in gone[1:] and not k.startswith("eval/")} for r in run_of(30)]
    for record in records[1:]:
        record |= {"kl_old/k3": 0.0, "reward/correct": record["reward/mean"]}  # on policy; one reward of weight 1
    shown = panels(drawn([records], ["run"]))
    assert set(RL_PANELS) - set(shown) == {"Held-out accuracy", "KL", "Clipped", "Sampler against trainer"}
    assert legend(shown["Reward"].get_legend()) == ["total", "format", "repetition"]
    assert shown["Completion length"].get_legend() is None


def test_equal_accuracies_are_all_shown():
    shown = panels(drawn([[{"step": 0, "eval/mean": 0.0, "eval/greedy": 0.0, "eval/pass@4": 0.0}]], ["run"]))
    assert legend(shown["Held-out accuracy"].get_legend()) == ["mean", "greedy", "pass@4"]


def test_several_runs_keep_their_colours_in_every_panel():
    figure = drawn([run_of(50, seed) for seed in range(3)], ["seed 0", "seed 1", "seed 2"])
    assert legend(figure.legends[0]) == ["seed 0", "seed 1", "seed 2"]
    assert list(panels(figure)) == RL_PANELS
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} == set(COLOURS[:3])


def test_runs_of_different_kinds_and_lengths_share_a_plot():
    shown = panels(drawn([run_of(50), sft_run(12)], ["rl", "sft"]))
    assert {"Loss", "Reward", "Learning rate"} <= set(shown)
    assert {axes.get_xlim() for axes in shown.values()} == {(0, 50)}


def test_a_spike_turns_an_axis_logarithmic():
    records = run_of(40, **{"grad_norm": lambda x, v: 500.0 if x == 0.5 else v})
    assert panels(drawn([records], ["run"]))["Gradient norm"].get_yscale() == "log"
    assert panels(drawn([run_of(40)], ["run"]))["Gradient norm"].get_yscale() == "linear"


@pytest.mark.filterwarnings("error")
def test_odd_runs_are_drawn_without_complaint(tmp_path):
    first = write(tmp_path / "$x^{$", [{"step": 0, "eval/mean": 0.5}])
    second = write(
        tmp_path / "_hidden", [{"step": 1, "mismatch/abs_mean": 0.0, "reward/mean": 1, "reward/$\\bad$": 0.0}]
    )
    for folders in ([first], [second], [first, second]):
        assert plot(folders, tmp_path / "odd.png", [folder.name for folder in folders]).stat().st_size > 1000


def test_what_cannot_be_plotted_is_said_in_one_sentence(tmp_path):
    folder = write(tmp_path / "run", [{"step": 1, "time/step": 3.0}])
    for folders, labels, message in (
        ([folder], None, "no metric here that a plot shows"),
        ([], None, "0 runs and 0 labels"),
        ([folder], ["a", "b"], "1 runs and 2 labels"),
    ):
        with pytest.raises(InputError, match=message):
            plot(folders, tmp_path / "run.png", labels)
    assert not (tmp_path / "run.png").exists()


# ---- page ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The page of a run whose texts are all hostile."""
    attack = "<script>alert(1)</script>"
    completions = completions_of()
    completions[0] |= {
        "completion": f"</pre></td>{attack}\ud800",
        "prompt": attack,
        "answer": f'"{attack}',
        attack: attack,
    }
    records = run_of(100, **{"truncated_frac": lambda x, v: 0.4 * x})
    for record in records[1:]:
        record[f"reward/{attack}"] = record["reward/mean"] / 2
        record[f"reward/repetition{attack}"] = -record["step"] / 100
    config = CONFIG | {"task": attack, attack: attack}
    folder = write(tmp_path_factory.mktemp("pages") / "<b>run", records, completions, config)
    return report(folder).read_text(encoding="utf-8")


def test_hostile_texts_stay_texts(page):
    assert "<script" not in page and "<b>run" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 8
    assert "&lt;/pre&gt;&lt;/td&gt;" in page


def test_a_page_needs_nothing_from_outside(page):
    assert re.findall(r'(?:src|href)="([^"]{0,22})', page) == ["data:image/png;base64,"]
    assert "http://" not in page and "https://" not in page and "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)


def test_a_page_shows_numbers_config_and_warnings(page):
    assert re.search(
        r"held-out accuracy 2\d\.\d% → 6\d\.\d% at step 100 \(mean of 8 samples for each of 64 prompts\)", page
    )
    assert re.search(r"<td>Held-out accuracy</td><td>greedy</td>(<td class=\"number\">\d\d\.\d%</td>){2}", page)
    assert '<td>loss.kl_coef</td><td class="number">0.04</td>' in page
    assert "<li>38% are cut off, 2% at first" in page and "<li>Looping" in page


def test_a_page_shows_completions_of_the_first_middle_and_last_step(page):
    table = page[page.index("<h2>Completions") :]
    assert re.findall(r'<tr><td class="number">(\d+)</td>', table) == ["1", "1", "51", "51", "100", "100"]
    assert "I add 51 and 40." in table and "user: What is 100 + 7?" in table


def test_a_page_of_a_healthy_run_shows_no_warnings(tmp_path):
    text = report(write(tmp_path / "run", run_of(30), completions_of(1), CONFIG)).read_text(encoding="utf-8")
    assert "Warnings" not in text and text.count("What is 1 +") == 2


def test_a_page_needs_only_metrics(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sft_run(12)))
    text = report(folder).read_text(encoding="utf-8")
    assert "12 steps" in text and "Completions" not in text
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


def test_damaged_lines_are_left_out_and_named_on_the_page(tmp_path, capsys):
    """Zeros over a page of the disk, half a line that another follows, a line that is no object, and the last one cut
    off; of completions also in a line of a step that is shown."""
    folder = write(tmp_path / "run", run_of(100), completions_of())
    for name, damage in (("metrics.jsonl", range(4, 90, 12)), ("completions.jsonl", (10, 101, 199))):
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        for kind, i in enumerate(damage):
            line = lines[i]
            lines[i] = (b"\0" * len(line) + b"\n", line[:20] + b"\0" * 20 + line[40:], line[:-9] + line)[kind % 3]
        (folder / name).write_bytes(b"".join(lines) + lines[-1][:-5])
    cli.main(["report", "--run", str(folder)])
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(
        "metrics.jsonl, lines 5, 17, 29, 41, 53 and 3 more: not a JSON object with a whole 'step'; left out"
    )
    assert said[1].endswith("completions.jsonl, lines 11, 102, 200: not a JSON object with a whole 'step'; left out")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f"<li>{sentence}</li>".replace("'", "&#x27;") in text for sentence in said) and len(said) == 2
    steps = re.findall(r'<tr><td class="number">(\d+)</td>', text[text.index("<h2>Completions") :])
    assert steps == ["1", "1", "51", "100"]


def test_a_log_without_any_whole_line_is_one_sentence(tmp_path, monkeypatch, complaint):
    monkeypatch.chdir(tmp_path)
    folder = write(Path("run"), [])
    (folder / "metrics.jsonl").write_bytes(b"\0" * 4096 + b"\n")
    assert "holds no finished step" in complaint("report", "--run", str(folder), left=["run/metrics.jsonl"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_next_write_clears_what_a_killed_one_left_but_not_what_a_living_one_writes(number, tmp_path):
    """A picture and a folder, whose writer is killed, or stopped in the middle and goes on after another's write."""
    folder = write(tmp_path / "run", run_of(12))
    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from minirl.files import atomic_folder, write_atomic

        def picture(staging):
            with atomic_folder("model") as model:
                (model / "weights").write_text("of the other")
                staging.write_text("of the other")
                print("writing", flush=True)
                os.kill(os.getpid(), int(sys.argv[1]))
        write_atomic("plot.png", picture)
    """
    command = [sys.executable, "-c", script, str(int(number))]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        os.waitpid(process.pid, os.WUNTRACED) if number == signal.SIGSTOP else process.wait()
        assert len(hidden := list(folder.glob(".*"))) == 2
        hidden_too = folder / ".plot.png.txt"
        hidden_too.write_text("not a staging file")
        plot([folder], folder / "plot.png")
        with atomic_folder(folder / "model"):
            pass
        hidden_too.unlink()
        if number == signal.SIGSTOP:
            assert sorted(folder.glob(".*")) == sorted(hidden)
            process.send_signal(signal.SIGCONT)
            assert process.wait() == 0
            assert (folder / "plot.png").read_text() == (folder / "model" / "weights").read_text() == "of the other"
    assert not list(folder.glob(".*"))


# ---- long runs -------------------------------------------------------------------------------------------------------


def test_columns_of_a_file_are_those_of_its_records(tmp_path, monkeypatch):
    """In lines of several layouts, with null, texts, lists, integers of any size and names that JSON escapes."""
    odd = [None, 3, -2.5e-7, 'a, "b": 1', [1, {"loss": 2}], 10**400, True, 1e300, -1e301]
    lines = [{"step": i, "loss": 1 / (i + 1), "x": odd[i % 9], 'reward/é, "': i} for i in range(60)]
    for i, line in enumerate(lines):
        line |= {"lr": odd[i // 7]} if i % 5 == 0 else {}
        line |= {f"reward/{i}": i} if i > 50 else {}
    (tmp_path / "log").write_text(
        "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines))
    )
    monkeypatch.setattr(logs, "BLOCK", 7)
    wanted = re.compile("loss|x|lr|reward/.*")
    found, expected = read_columns(tmp_path / "log", wanted, []), Columns.of(lines)
    assert found.steps.tolist() == list(range(60)) and list(found.values) == list(expected.values)
    for name, values in expected.values.items():
        np.testing.assert_array_equal(found.values[name], values)
    assert [name for name in read_columns(tmp_path / "log", re.compile("lr"), []).values] == ["lr"]


def test_a_long_curve_keeps_its_spikes_and_its_means():
    steps = np.arange(10 * POINTS)
    values = np.random.default_rng(0).normal(size=len(steps))
    values[[0, 4321, -1]] = 50, -70, 60
    at, drawn_values = extremes(steps, values)
    assert len(at) <= 2 * POINTS and (np.diff(at) > 0).all() and np.array_equal(drawn_values, values[at])
    assert {0, 4321, len(steps) - 1} <= set(at.tolist())
    values[[0, 4321, -1]] = 0
    middles, means = smooth(steps, values, len(steps) // 20)
    exact = smooth_exactly(values, len(steps) // 20)[middles]
    assert len(middles) <= POINTS and np.abs(means - exact)[50:-50].max() < 0.03
    short = smooth(steps[:POINTS], values[:POINTS], 30)
    assert np.array_equal(short[0], steps[:POINTS]) and np.allclose(short[1], smooth_exactly(values[:POINTS], 30))


def smooth_exactly(values: np.ndarray, width: int) -> np.ndarray:
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def test_a_long_run_is_read_and_drawn_in_little_memory_and_says_what_is_drawn(tmp_path):
    """Of 20,000 steps 30 times as much as a line stays, in place of all of their lines, which are 20 MB as objects."""
    record = run_of(1)[1] | {"eval/mean": 0.5, **{f"other/{i}": 0.1 + i for i in range(40)}}
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "metrics.jsonl", "w") as file:
        for step in range(20_000):
            file.write(json.dumps(record | {"step": step, "grad_norm": step % 97}) + "\n")
    tracemalloc.start()
    try:
        log = read_log(tmp_path / "run")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shown = sum(values.nbytes for values in log.metrics.values.values())
    assert shown < 20_000 * 8 * 45 and peak < 2 * shown + 8e6
    figure = draw([log.metrics], ["long"])
    assert figure._supxlabel.get_text() == "faint: lowest and highest of every 20 steps   full: mean of 1000 steps"
    assert max(len(line.get_xdata()) for axes in figure.axes for line in axes.lines) <= 2 * POINTS


def preference_run(steps: int = 60) -> list[dict]:
    """Loss and accuracy of each step; held-out accuracy before and at every twentieth."""
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    for step in range(1, steps + 1):
        held = {"eval/accuracy": 0.5 + 0.4 * step / steps} if step % 20 == 0 else {}
        lines.append({"step": step, "loss": 0.7 - step / 200, "accuracy": 0.5 + step / 200, **held})
    return lines


def test_held_out_points_are_drawn_as_they_are_beside_a_smoothed_line():
    records = preference_run()
    accuracy = panels(drawn([records], ["x"]))["Accuracy"]
    curves = [line.get_ydata().tolist() for line in accuracy.lines]
    assert Columns.of(records).series("eval/accuracy")[1].tolist() in curves
    assert len(curves) == 3  # of training each step and their mean


def test_the_headline_of_a_run_on_pairs_is_their_order(tmp_path):
    text = report(write(tmp_path / "run", preference_run())).read_text(encoding="utf-8")
    assert "60 steps: held-out pairs in the right order 50.0% → 90.0%" in text


def test_a_reward_model_and_a_moving_weight_have_their_panels():
    records = run_of()
    for record in records:
        record |= {"reward_model/accuracy": 1 - record["step"] / 200, "beta": 0.1 + record["step"] / 1000}
    assert {"Reward model", "Weight of the KL"} <= panels(drawn([records], ["x"])).keys()
