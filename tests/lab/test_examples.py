"""The pipelines of examples/ go through all of their stages, on the embedded model with few steps."""

import importlib
import sys
from pathlib import Path

import pytest

from minirl.lab.logs import read_metrics

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("sft_grpo", "rlhf"):
        sys.modules.pop(name, None)


@pytest.fixture
def few(example, monkeypatch):
    """Both pipelines with small batches."""
    sft_grpo, rlhf = example("sft_grpo"), example("rlhf")
    monkeypatch.setitem(sft_grpo.SIZES["demo"], "prompts", 8)
    monkeypatch.setitem(sft_grpo.SIZES["demo"], "eval_prompts", 16)
    monkeypatch.setitem(rlhf.OUTCOMES["demo"], "prompts", 512)
    monkeypatch.setitem(rlhf.REWARD["demo"], "steps", 3)
    return sft_grpo, rlhf


def test_sft_then_grpo(few, tmp_path, capsys):
    few[0].main(["--out", str(tmp_path), "--sft-steps", "5", "--steps", "2"])
    said = capsys.readouterr().out
    rows = [line.split() for line in said.partition("held-out accuracy")[2].splitlines() if line.strip()]
    assert [row[0] for row in rows] == ["after", "SFT", "GRPO"]
    assert all(len(row) == 4 and all(0 <= float(share) <= 1 for share in row[1:]) for row in rows[1:])
    assert (tmp_path / "grpo" / "model" / "model.safetensors").exists()


def test_rlhf_trains_on_the_model_alone_and_logs_the_rule(few, tmp_path, capsys):
    few[1].main(["--out", str(tmp_path), "--sft-steps", "40", "--steps", "2"])
    said = capsys.readouterr().out
    assert "of the held-out pairs right" in said and "PPO on the reward model" in said
    for record in read_metrics(tmp_path / "ppo")[1:]:
        score = record[f"reward/model:{tmp_path / 'reward' / 'model'}"]
        assert record["reward/mean"] == pytest.approx(score)
        assert 0 <= record["reward/correct"] <= 1
        assert record["reward/correct"] != pytest.approx(score)
    assert (tmp_path / "rlhf.png").read_bytes().startswith(b"\x89PNG")
