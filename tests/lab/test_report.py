"""Reports on made-up run folders: what is drawn, what is warned about, and that a page carries no foreign markup."""

import json
import re
from pathlib import Path

import pytest
from helpers import run_of, sft_run

from minirl.errors import InputError
from minirl.lab.report import COLOURS, draw, plot, read_metrics, report, series


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
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .*: remove the line$"):
        read_metrics(folder)


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
    values = [1, None, "x", float("nan"), float("inf"), 2.5]
    steps, found = series([{"step": i, "loss": value} for i, value in enumerate(values)] + [{"step": 9}], "loss")
    assert steps.tolist() == [0, 5] and found.tolist() == [1.0, 2.5]


# ---- plot ------------------------------------------------------------------------------------------------------------


def test_a_plot_of_an_rl_run_shows_every_panel(tmp_path):
    png = plot([write(tmp_path / "run", run_of())], tmp_path / "plots" / "run.png")
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) >= 1200
    shown = panels(draw([run_of()], ["run"]))
    assert list(shown) == RL_PANELS
    assert legend(shown["Held-out accuracy"].get_legend()) == ["mean", "greedy", "pass@8", "maj@8"]
    assert legend(shown["Reward"].get_legend()) == ["total", "correct", "format", "repetition"]
    assert shown["Sampler against trainer"].get_yscale() == "log" and shown["Speed"].get_ylabel() == "tokens/s"


def test_a_plot_of_an_sft_run_shows_loss_entropy_and_learning_rate():
    assert list(panels(draw([sft_run()], ["sft"]))) == ["Loss", "Entropy", "Gradient norm", "Learning rate", "Speed"]


def test_panels_and_lines_without_news_are_left_out():
    gone = ("kl_old/k3", "kl_ref/k3", "clip/frac", "mismatch/abs_mean", "mismatch/abs_max", "len/p95")
    records = [{k: v for k, v in r.items() if k not in gone[1:] and not k.startswith("eval/")} for r in run_of(30)]
    for record in records[1:]:
        record |= {"kl_old/k3": 0.0, "reward/correct": record["reward/mean"]}  # on policy; one reward of weight 1
    shown = panels(draw([records], ["run"]))
    assert set(RL_PANELS) - set(shown) == {"Held-out accuracy", "KL", "Clipped", "Sampler against trainer"}
    assert legend(shown["Reward"].get_legend()) == ["total", "format", "repetition"]
    assert shown["Completion length"].get_legend() is None


def test_equal_accuracies_are_all_shown():
    shown = panels(draw([[{"step": 0, "eval/mean": 0.0, "eval/greedy": 0.0, "eval/pass@4": 0.0}]], ["run"]))
    assert legend(shown["Held-out accuracy"].get_legend()) == ["mean", "greedy", "pass@4"]


def test_several_runs_keep_their_colours_in_every_panel():
    figure = draw([run_of(50, seed) for seed in range(3)], ["seed 0", "seed 1", "seed 2"])
    assert legend(figure.legends[0]) == ["seed 0", "seed 1", "seed 2"]
    assert list(panels(figure)) == RL_PANELS
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} == set(COLOURS[:3])


def test_runs_of_different_kinds_and_lengths_share_a_plot():
    shown = panels(draw([run_of(50), sft_run(12)], ["rl", "sft"]))
    assert {"Loss", "Reward", "Learning rate"} <= set(shown)
    assert {axes.get_xlim() for axes in shown.values()} == {(0, 50)}


def test_a_spike_turns_an_axis_logarithmic():
    records = run_of(40, **{"grad_norm": lambda x, v: 500.0 if x == 0.5 else v})
    assert panels(draw([records], ["run"]))["Gradient norm"].get_yscale() == "log"
    assert panels(draw([run_of(40)], ["run"]))["Gradient norm"].get_yscale() == "linear"


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


def test_broken_completions_are_named(tmp_path):
    folder = write(tmp_path / "run", run_of(12))
    (folder / "completions.jsonl").write_text("{\n{}\n")
    with pytest.raises(InputError, match=r"completions\.jsonl, line 1"):
        report(folder)
    assert not (folder / "report.html").exists()


def preference_run(steps: int = 60) -> list[dict]:
    """Loss and accuracy of each step; held-out accuracy before and at every twentieth."""
    lines = [{"step": 0, "eval/accuracy": 0.5}]
    for step in range(1, steps + 1):
        held = {"eval/accuracy": 0.5 + 0.4 * step / steps} if step % 20 == 0 else {}
        lines.append({"step": step, "loss": 0.7 - step / 200, "accuracy": 0.5 + step / 200, **held})
    return lines


def test_held_out_points_are_drawn_as_they_are_beside_a_smoothed_line():
    records = preference_run()
    accuracy = panels(draw([records], ["x"]))["Accuracy"]
    drawn = [line.get_ydata().tolist() for line in accuracy.lines]
    assert series(records, "eval/accuracy")[1].tolist() in drawn
    assert len(drawn) == 3  # of training each step and their mean


def test_the_headline_of_a_run_on_pairs_is_their_order(tmp_path):
    text = report(write(tmp_path / "run", preference_run())).read_text(encoding="utf-8")
    assert "60 steps: held-out pairs in the right order 50.0% → 90.0%" in text


def test_a_reward_model_and_a_moving_weight_have_their_panels():
    records = run_of()
    for record in records:
        record |= {"reward_model/accuracy": 1 - record["step"] / 200, "beta": 0.1 + record["step"] / 1000}
    assert {"Reward model", "Weight of the KL"} <= panels(draw([records], ["x"])).keys()
