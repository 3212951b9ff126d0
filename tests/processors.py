"""Run the numeric tests as on other processors: `make test-processors`, or a small part with --quick.

The matrix libraries choose their kernels by instruction set, and each kernel adds in its own order. A test that passes
with one order alone asserts bits that nothing promises.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
SETTINGS = {
    "AVX2": "ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2",
    "SSE4": "ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41",
    "MKL_CBWR": "MKL_CBWR=COMPATIBLE",
}
# What depends on floating point in PyTorch; Triton's interpreter computes with numpy, whatever the setting.
NUMERIC = [
    *(
        "exact",
        "grpo_by_hand",
        "model",
        "batch",
        "sampler",
        "train",
        "ppo",
        "stored",
        "resume",
        "optimizer",
        "losses",
        "advantages",
    ),
    *("kl", "reward_losses", "preferences", "prefer", "reward_model", "online_reward", "kernels", "policy_loss_kernel"),
    *("sampling_kernel", "scan"),
]
# Slow ones are left out where faster ones run the same products or hold the same promise.
SLOW = "ctrl_c command before_its_first family what_changes_no_result rft closed_form fair_sample into_their_order"
CHOSEN = " and ".join(f"not {name}" for name in ["triton", *SLOW.split()])
QUICK, FEW = ["exact"], "windows or head"


def command(names: list[str], *options: str, chosen: str = CHOSEN) -> list[str]:
    files = [str(next(TESTS.rglob(f"test_{name}.py"))) for name in names]
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-n2", "-k", chosen, *options, *files]


def run(name: str, setting: str, commands: list[list[str]]) -> bool:
    """Run the commands side by side; print what failed and a line for the setting."""
    print(f"{name}: running {setting or 'as it is'}", flush=True)
    environment, start = os.environ | dict(pair.split("=") for pair in setting.split()), time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=TESTS.parent, env=environment, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    passed = not any(process.returncode for process in running)
    if not passed:
        print(*outputs, sep="\n")
    last = "; ".join(output.strip().rpartition("\n")[2].strip("= ") for output in outputs)
    print(f"{name}: {'passed' if passed else 'FAILED'} in {time.monotonic() - start:.0f} s: {last}", flush=True)
    return passed


def main() -> int:
    if "--quick" in sys.argv:
        return not all([run(*setting, [command(QUICK, chosen=FEW)]) for setting in SETTINGS.items()])
    passed = [run(*setting, [command(NUMERIC, "--dist=worksteal")]) for setting in SETTINGS.items()]
    # The default, by two runs of tests that disturb one another; alone it is what `make test` runs.
    halves = [command(NUMERIC[part::2], "--dist=worksteal") for part in (0, 1)]
    return not all([*passed, run("default, on shared cores", "", halves)])


if __name__ == "__main__":
    sys.exit(main())
