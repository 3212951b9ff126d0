"""Made-up records of runs, as metrics.jsonl has them."""

import math
import random


def healthy(step: int, steps: int, seed: int = 0) -> dict:
    """What a good GRPO run logs after a step."""
    rng = random.Random(f"{seed} {step}")
    x = step / steps
    learned = 1 / (1 + math.exp(4 - 8 * x - 0.3 * seed))

    def near(value: float, spread: float = 0.1) -> float:
        return value * math.exp(rng.gauss(0, spread))

    accuracy = min(1.0, max(0.0, 0.25 + 0.45 * learned + rng.gauss(0, 0.04)))
    return {
        "step": step,
        "reward/mean": accuracy + 0.2 * min(1, 0.5 + x),
        "reward/max": 1.2,
        "reward/correct": accuracy,
        "reward/format": min(1, 0.5 + x),
        "reward/repetition": -near(0.04),
        "reward/unscored_frac": 0.0,
        "group/signal_frac": min(1.0, near(0.6)),
        "group/all_correct_frac": near(0.1),
        "group/all_wrong_frac": near(0.3),
        "len/mean": near(80 + 30 * x),
        "len/p95": near(130 + 40 * x),
        "truncated_frac": near(0.02, 0.4),
        "repetition_frac": near(0.01, 0.4),
        "too_short_frac": 0.0,
        "entropy": near(0.25 + 0.35 * (1 - x)),
        "kl_ref/k3": near(0.08 * x + 1e-4, 0.2),
        "kl_old/k3": near(2e-4),
        "clip/frac": near(0.004, 0.4),
        "mismatch/abs_mean": near(2e-3),
        "mismatch/abs_max": near(4e-2, 0.3),
        "grad_norm": near(0.4, 0.3),
        "lr": 1e-6,
        "tokens_per_s/rollout": near(5200, 0.05),
        "tokens_per_s/train": near(11800, 0.05),
    }


def evaluation(step: int, steps: int, seed: int = 0) -> dict:
    rng = random.Random(f"eval {seed} {step}")
    mean = 0.26 + 0.42 / (1 + math.exp(4 - 8 * step / steps)) + rng.gauss(0, 0.01)
    accuracies = {
        "eval/mean": mean,
        "eval/greedy": mean + 0.05,
        "eval/pass@8": 0.5 + mean / 2,
        "eval/maj@8": mean + 0.08,
    }
    return accuracies | {"eval/prompts": 64, "eval/samples": 8, "eval/temperature": 1.0, "eval/len_mean": 90.0}


def run_of(steps: int = 100, seed: int = 0, **changes) -> list[dict]:
    """The records of a healthy run; a change is a function of the run's fraction x and what the metric would be, NaN
    where a healthy run has none."""
    records = [{"step": 0, **evaluation(0, steps, seed)}]
    for step in range(1, steps + 1):
        record = healthy(step, steps, seed)
        record |= evaluation(step, steps, seed) if step % 10 == 0 else {}
        records.append(record)
    for name, change in changes.items():
        having = [record for record in records if name in record] or records[1:]
        for record in having:
            record[name] = change(record["step"] / steps, record.get(name, math.nan))
    return records


def sft_run(steps: int = 60) -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "step": step,
            "loss": 0.4 + 2 * math.exp(-step / 12) + rng.gauss(0, 0.03),
            "entropy": 0.4 + 1.8 * math.exp(-step / 10) + rng.gauss(0, 0.02),
            "grad_norm": 0.5 + 3 * math.exp(-step / 5) + abs(rng.gauss(0, 0.1)),
            "lr": 1e-5 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "tokens": 4000,
            "tokens_per_s/train": 21000 + rng.gauss(0, 300),
            "memory/peak_gb": 3.1,
        }
        for step in range(1, steps + 1)
    ]
