"""Compile every launch of the kernels for GPUs that this machine need not have, and check the machine code.

    python -m bench compile

The public functions of `minirl.kernels` run on small CPU tensors with real vocabulary sizes; each launch is recorded
instead of run, specialised by triton as on a GPU, and compiled for every target. Registers, shared memory and spills
come from the cubin, the widths of its loads from its disassembly; `cuobjdump` comes with triton. Needs a process
without TRITON_INTERPRET.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

import minirl.kernels
from bench import common
from minirl.kernels import backend

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
VOCAB, ACTIVE = 151_936, 151_669  # a real head's rows, and the ids that have a text
SWEEP = re.compile(r"stats|gradient|fused|sums|floor")  # kernels that read whole rows of logits
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes a thread loads; else 4


class Launch(NamedTuple):
    """The arguments of one call of `backend.launch`, and the use that it was made for."""

    use: str
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """One kernel on one target."""

    kernel: str
    use: str
    target: int  # compute capability
    registers: int  # a thread
    shared: int  # bytes a block
    stack: int  # bytes a thread
    spills: int  # instructions that load from or store to local memory
    widest_load: int  # bytes a thread reads from global memory in one instruction
    loads: dict[str, int]  # load instruction to how often it stands in the code


class _Pretended:
    """A driver that tells triton that a GPU of this compute capability is present, which is all that compiling asks."""

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        return self.target  # triton keeps what it compiled by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


def record(uses: dict[str, Callable[[], object]]) -> list[Launch]:
    """Return the launches of some calls without running any, so that the results of the calls hold no values."""
    if backend.INTERPRETED:
        raise RuntimeError("kernels compile only in a process without TRITON_INTERPRET; unset it")
    launches, use = [], ""

    def recorder(kernel, grid, *args, **options):
        launches.append(Launch(use, kernel, grid, args, options))

    launch, deterministic = backend.launch, torch.are_deterministic_algorithms_enabled()
    backend.launch, backend.INTERPRETED = recorder, True  # the second lets backend="triton" take CPU tensors
    # Results that no kernel filled in are then NaN, which is not zero: no row drops out.
    torch.use_deterministic_algorithms(True)
    try:
        for use, call in uses.items():  # noqa: B007, the recorder reads it
            call()
    finally:
        backend.launch, backend.INTERPRETED = launch, False
        torch.use_deterministic_algorithms(deterministic)
    return launches


def compile_launch(launch: Launch, target: int):
    """Return triton's compiled kernel; launches that compile to the same code have the same `hash`."""
    driver.set_active(_Pretended(target))
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


def read_cubin(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Return registers a thread, bytes of stack, and every load and local-memory instruction with its count."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    memory = re.findall(r"\b((?:LDG|LDGSTS|LDL|STL|UBLKCP|UTMALDG)\b[.\w]*)", text)
    return int(usage[1]), int(usage[2]), {name: memory.count(name) for name in sorted(set(memory))}


def load_width(instruction: str) -> int:
    """Return the bytes that a thread reads: 16 for LDG.E.128.CONSTANT, 4 for LDG.E."""
    return next((WIDTHS[part] for part in instruction.split(".") if part in WIDTHS), 4)


def _inspect(launch: Launch, target: int, compiled) -> Compiled:
    registers, stack, memory = read_cubin(compiled.asm["cubin"])
    loads = {name: count for name, count in memory.items() if name.startswith("LDG")}
    spills = sum(count for name, count in memory.items() if name.startswith(("LDL", "STL")))
    widest = max(map(load_width, loads), default=0)
    name = launch.kernel.fn.__name__
    return Compiled(name, launch.use, target, registers, compiled.metadata.shared, stack, spills, widest, loads)


def compile_all(
    launches: list[Launch], in_all_forms=TARGETS, progress: Callable[[str], None] = lambda text: None
) -> list[Compiled]:
    """Compile every kernel among the launches for every target: in all different forms for the targets of
    `in_all_forms`, in the form of its first launch for the others. Disassembly runs in other threads meanwhile."""
    seen, jobs = set(), []
    first = {launch.kernel: launch for launch in reversed(launches)}
    with ThreadPoolExecutor(2) as pool:
        for launch in launches:
            for target in TARGETS if launch is first[launch.kernel] else in_all_forms:
                compiled = compile_launch(launch, target)
                if (target, compiled.hash) not in seen:
                    seen.add((target, compiled.hash))
                    jobs.append(pool.submit(_inspect, launch, target, compiled))
                    progress(f"sm_{target}  {launch.kernel.fn.__name__}  {launch.use}")
        return [job.result() for job in jobs]


def kernels_of(package: ModuleType = minirl.kernels) -> set[str]:
    """Return the names of all kernels of the package, which end in _kernel."""
    modules = [m for name in dir(package) if isinstance(m := getattr(package, name), ModuleType)]
    found = {v.fn.__name__ for m in modules for v in vars(m).values() if isinstance(v, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


# ---- what to compile -------------------------------------------------------------------------------------------------


def uses(rows: int = 4, vocab: int = VOCAB, width: int = 16) -> dict[str, Callable[[], object]]:
    """Return calls that together launch every kernel in every form that training and sampling use."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        calls |= {f"{use}, {name}": call for use, call in _calls(dtype, rows, vocab, width)}
    calls |= dict(_scans())
    return calls


def _calls(dtype: torch.dtype, rows: int, vocab: int, width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    import minirl.kernels as k

    logits = torch.zeros(rows, vocab, dtype=dtype, requires_grad=True)
    hidden = torch.zeros(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocab, width, dtype=dtype, requires_grad=True)
    targets, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    given = {"old_logp": ones, "ref_logp": ones, "rollout_logp": ones}
    half = torch.arange(rows, dtype=torch.int64)[::2]

    def backward(outputs):
        sum(x.sum() for x in outputs if x.requires_grad).backward()

    def fused(active=None, **options):
        more = given | {"active": active, "backend": "triton"}
        backward(k.fused_policy_loss(logits, targets, ones, ones, k.TokenLoss(**options), **more))

    def linear(softcap=None, **options):
        more = {"backend": "triton", "logits_dtype": torch.float32, "softcap": softcap}
        backward(k.linear_policy_loss(hidden, weight, targets, ones, ones, k.TokenLoss(**options), **given | more))

    def some_rows():
        stats = k.logprobs.Stats(*torch.ones(4, rows))
        out = logits.new_empty(len(half), vocab)
        k.logprobs.gradient_triton(logits.detach(), targets, ones, stats, ones, ones, out, half)

    def scale():
        kernel = k.policy_loss._scale_kernel  # on a GPU only
        backend.launch(kernel, (1,), logits.detach(), ones.sum(), logits.numel(), BLOCK=k.logprobs.BLOCK)

    yield "token_logprobs", lambda: backward(k.token_logprobs(logits, targets, backend="triton"))
    yield "clip, k3, entropy", lambda: fused(kl="k3", kl_coef=0.04, entropy_coef=0.01)
    yield from _draws(logits.detach(), targets)
    if dtype != torch.bfloat16:
        return  # the head's logits are fp32 below, whatever its weights
    yield "temperature of each row", lambda: k.token_logprobs(logits.detach(), targets, ones, backend="triton")
    yield "clip", lambda: fused()
    padded = {"active": ACTIVE, "backend": "triton"}
    yield "token_logprobs, padded rows", lambda: backward(k.token_logprobs(logits, targets, **padded))
    yield "clip, padded rows", lambda: fused(active=ACTIVE)
    yield "linear, clip, k3", lambda: linear(kl="k3", kl_coef=0.04)
    yield "linear, softcap", lambda: linear(softcap=30.0)
    yield "gradient of some rows, a temperature of each", some_rows
    yield "incoming gradient", scale
    yield "is_pg, k2", lambda: fused(surrogate="is_pg", kl="k2", kl_coef=0.04)
    yield "sapo, k3_is, mask", lambda: fused(surrogate="sapo", kl="k3_is", kl_coef=0.04, importance="token_mask")


def _draws(logits, positions) -> Iterator[tuple[str, Callable[[], object]]]:
    import minirl.kernels as k

    ways = {"top-k, top-p": {"top_k": 50, "top_p": 0.9}}
    if logits.dtype == torch.bfloat16:
        ways |= {"plain": {}, "min-p": {"min_p": 0.1}, "padded rows": {"top_p": 0.9, "active": ACTIVE}}
    for name, way in ways.items():
        yield (
            f"sampling, {name}",
            lambda way=way: k.sample_tokens(logits, 0, positions, positions, **way, backend="triton"),
        )


def _scans() -> Iterator[tuple[str, Callable[[], object]]]:
    import minirl.kernels as k

    x = torch.zeros(4, 500)
    yield "suffix_scan", lambda: k.suffix_scan(x, x, backend="triton")
    yield "gae", lambda: k.gae(x, x, x.bool(), backend="triton")


# ---- the suite -------------------------------------------------------------------------------------------------------


def is_sweep(row: Compiled) -> bool:
    return bool(SWEEP.search(row.kernel))


def show(rows: list[Compiled]) -> str:
    head = ("kernel", "launched for", "target", "registers", "shared", "spills", "widest load", "16-byte loads")
    lines = []
    for r in rows:
        wide = "yes" if r.widest_load >= 16 else "no"
        numbers = (f"sm_{r.target}", str(r.registers), str(r.shared), str(r.spills), f"{r.widest_load} B", wide)
        lines.append((r.kernel, r.use, *numbers))
    return common.table(head, lines)


def failures(rows: list[Compiled]) -> list[str]:
    """Return a sentence for each row that breaks the rules: no spills, and 16-byte loads in every sweep over a row."""
    bad = []
    for r in rows:
        where = f"{r.kernel} ({r.use}) on sm_{r.target}"
        if r.spills or r.stack:
            bad.append(f"{where} spills: {r.spills} local-memory instructions, {r.stack} bytes of stack")
        if is_sweep(r) and r.widest_load < 16:
            bad.append(f"{where} reads rows at most {r.widest_load} bytes at a time")
    return bad


def suite(args) -> dict:
    """Compile, print the table, return it for the JSON."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is not set
    rows = compile_all(record(uses()), TARGETS[1:2] if args.quick else TARGETS, common.progress)
    print(show(rows))
    bad = failures(rows)
    print("\n".join(bad) or f"No spills, and 16-byte loads in every sweep over a row; {len(rows)} kernels.")
    table = [r._asdict() | {"sweep": is_sweep(r)} for r in rows]
    return {"triton": triton.__version__, "rows": table, "failures": bad, "kernels": sorted(kernels_of())}
