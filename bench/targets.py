"""Compare measurements with the targets of the kernels: a table of passed, failed and not measured."""

from typing import NamedTuple

MAIN = {"rows": 8192, "vocab": 151_936}
MIB = 1 << 20


class Target(NamedTuple):
    what: str
    target: str
    measured: str
    passed: bool | None  # None: not measured here


def _record(result: dict, operation: str, **shape) -> dict:
    """Return the first record of an operation at a shape with these sizes, or {}."""
    fits = (r for r in result["records"] if r["operation"] == operation)
    return next((r for r in fits if shape.items() <= r["shape"].items()), {})


def _number(record: dict, rival: str, name: str) -> float | None:
    value = record.get("rivals", {}).get(rival, {}).get(name)
    value = value["median"] if isinstance(value, dict) else value
    return value if isinstance(value, int | float) else None


def _judge(what: str, limit: float, value: float | None, unit: str, at_least: bool = False, why: str = "") -> Target:
    target = f"{'>=' if at_least else '<='} {limit:g}{unit}"
    if value is None:
        return Target(what, target, why or "not measured", None)
    return Target(what, target, f"{value:.3g}{unit}", value >= limit if at_least else value <= limit)


def _ratio(record: dict, over: str, under: str, name: str) -> float | None:
    a, b = _number(record, over, name), _number(record, under, name)
    # Below one MiB it is small tensors of a number a row; a ratio to nothing says nothing.
    return None if a is None or b is None else a / max(b, MIB if name == "memory" else 0)


def on_gpu(result: dict, why: str) -> list[Target]:
    """Judge the kernels on a GPU: bf16, N = 8192, V = 151,936."""
    stats, policy = _record(result, "stats", **MAIN), _record(result, "policy", **MAIN)
    head = _record(result, "linear_policy", **MAIN, width=1536)
    times = [_number(r, "minirl", "seconds") for r in (stats, head)]
    fused = _number(policy, "minirl in place", "seconds")
    above = _number(head, "minirl", "memory")
    above = None if above is None else (above - head["gradients"]) / MIB

    def ms(seconds):
        return None if seconds is None else seconds * 1e3

    return [
        _judge("statistics, forward", 0.68, ms(times[0]), " ms", why=why),
        _judge("fused loss in place, forward and backward", 1.5, ms(fused), " ms", why=why),
        _judge("linear_policy_loss, forward and backward, D 1536", 17.5, ms(times[1]), " ms", why=why),
        _judge("  its memory above inputs and gradients", 1024, above, " MiB", why=why),
        _judge("eager / fused loss, time", 8, _ratio(policy, "eager", "minirl in place", "seconds"), " x", True, why),
        _judge("Liger / fused loss, time", 1.3, _ratio(policy, "Liger", "minirl in place", "seconds"), " x", True, why),
        _judge("eager / fused loss, memory", 10, _ratio(policy, "eager", "minirl in place", "memory"), " x", True, why),
        _judge("eager / linear_policy_loss, memory", 10, _ratio(head, "eager", "minirl", "memory"), " x", True, why),
    ]


def on_cpu(result: dict, why: str) -> list[Target]:
    """Judge a training step on a CPU with V = 151,936 and 4,096 tokens, and the sampling of a decode step."""
    step = result.get("training_step", {})
    real = step.get("size", {}).get("tokens") == 4096
    why = why or ("not measured: --quick takes fewer tokens" if step and not real else "")
    memory, seconds = (step.get(name) if real else None for name in ("memory_ratio", "time_ratio"))
    decode = result.get("decode_step", {})
    share = decode.get("top_p_share") if decode.get("size", {}).get("slots") == 256 else None
    return [
        _judge("top-p sampling, share of a decode step of 256 slots", 0.15, share, "", why=why),
        _judge("training step of 4096 tokens, minirl / eager, memory", 0.2, memory, " x", why=why),
        _judge("  time", 1.0, seconds, " x", why=why),
    ]


def without_signal(result: dict) -> list[Target]:
    """Judge the time with half of the rows without signal over that of all rows, at the largest shape measured."""
    half = [r for r in result["records"] if r["operation"] == "linear_policy_half"]
    if not half:
        return [_judge("half of the rows without signal / all rows, time", 0.6, None, " x")]
    half = max(half, key=lambda r: r["shape"]["rows"] * r["shape"]["vocab"])
    whole = _record(result, "linear_policy", **half["shape"])
    a, b = _number(half, "minirl", "seconds"), _number(whole, "minirl", "seconds")
    ratio = None if a is None or b is None else a / b
    return [_judge("half of the rows without signal / all rows, time", 0.6, ratio, " x")]


def checks(result: dict) -> list[Target]:
    """Judge the checks of `bench.checks`: equal bits, no new compilations, large matrices."""
    out = []
    for name, what, target in (
        ("two_runs", "bitwise equal: two runs", True),
        ("chunk_sizes", "bitwise equal: chunk sizes", True),
        ("row_orders", "bitwise equal: row orders", True),
        ("new_compilations", "kernels compiled anew over 50 lengths", 0),
        ("beyond_32_bits", "error where N·V > 2^31", 1e-3),
    ):
        value = result.get("checks", {}).get(name)
        if isinstance(value, str | None):
            out.append(Target(what, str(target), value or "not measured", None))
        else:
            fine = value <= target if isinstance(target, float) else value == target
            out.append(Target(what, f"<= {target:g}" if isinstance(target, float) else str(target), str(value), fine))
    return out


def judge(result: dict, cuda: bool) -> list[Target]:
    gpu = on_gpu(result, "" if cuda else "not measured: no GPU")
    return [
        *gpu,
        *on_cpu(result, "not measured: run on a GPU" if cuda else ""),
        *without_signal(result),
        *checks(result),
    ]


def lines(targets: list[Target]) -> list[tuple[str, ...]]:
    words = {True: "pass", False: "FAIL", None: "-"}
    return [(t.what, t.target, t.measured, words[t.passed]) for t in targets]
