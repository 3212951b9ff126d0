"""Show that a change of the code changed no number: run many small trainings, and compare every bit that they leave.

    python tests/referee.py run --python OLD/.venv/bin/python --material M --out A
    python tests/referee.py run --python NEW/.venv/bin/python --material M --out B
    python tests/referee.py compare A/digests.json B/digests.json

Only the command line is driven, `python -m minirl ...`, so any two checkouts can be compared, wherever their modules
lie; this file needs nothing but the standard library. The material (checkpoints and data) is made once, by the first
interpreter, so that both sides start from the same bytes. Everything runs on one thread and with fixed instruction
sets, as other ones add in another order. Each command is a fork of one process that has imported everything, because
an import takes longer than most cases.

A digest names each tensor, metric, field of a config and line of output by itself. What is measured and not computed
(times, speeds, memory), plots and reports are left out. A run that was cut short and resumed must equal the one that
was not: `resumed` holds what does not.
"""

import argparse
import atexit
import contextlib
import fnmatch
import gc
import hashlib
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import struct
import subprocess
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""},
    **{"MKL_CBWR": "AVX2,STRICT", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    **{"MPLBACKEND": "Agg", "COLUMNS": "120", "TERM": "dumb"},
}
MEASURED = ("time/", "memory/", "tokens_per_s/")  # beginnings of the metrics that differ between equal runs
LEFT_OUT = (".png", ".html", "manifest.json")  # a manifest knows the logs, which hold times
OUTPUT = "output"  # of the commands of a case, among its files
ABSENT = "(absent)"
NUMBER = r"[\d.,+–]+"
MASKED = (  # what an output says of time and space
    (re.compile(rf"{NUMBER} (tok/s|s\b|[kMGT]?B\b|min\b)"), r"# \1"),
    (re.compile(r"\d+:\d\d:\d\d"), "#"),
)

# ---- material: checkpoints and data ---------------------------------------------------------------------------------

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
ALPHABET = "0123456789+=~(,) \n?.abcdefghijklmnopqrstuvwxyz"  # one token a character
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": len(SPECIAL) + len(ALPHABET),
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "eos_token_id": 2,
}
REWARDS = '''
def spread(prompts, completions, **columns):
    """Several values among the completions of any prompt."""
    return [len(set(c)) / 6 for c in completions]


def odd(prompts, completions, **columns):
    """Right or wrong, for every policy."""
    return [float(len(c) % 2) for c in completions]


def lines(prompts, completions, **columns):
    """A reward for each line."""
    return [[len(line) / 4 for line in c.splitlines()] or 0.0 for c in completions]


def faulty(prompts, completions, **columns):
    """No score for some completions, and an exception for others."""
    return [None if "9" in c else 1 / (0 if "8" in c else len(c)) for c in completions]
'''


def make_material(folder: Path, python: str) -> None:
    """Write data and checkpoints: random ones, and with `python` a policy that is right now and then, its outcomes and
    reward models."""
    write_data(folder)
    write_checkpoint(folder / "random", "qwen3", seed=0)
    write_checkpoint(folder / "other", "qwen2", seed=1)
    commands = (
        "sft --model random --data sums.jsonl --steps 150 --batch 32 --lr 1e-2 --out sft",
        f"outcomes --model sft/model {TASK} --prompts 40 --samples 6 --max-tokens 9 --temperature 1 --out outcomes",
        "reward --model sft/model --data outcomes/pairs.jsonl --steps 8 --batch 8 --lr 1e-3 --out pairwise",
        "reward --model sft/model --kind bce --data outcomes/labels.jsonl --steps 8 --batch 8 --lr 1e-3 --out bce",
        "reward --model sft/model --kind process --data steps.jsonl --steps 8 --batch 8 --lr 1e-3 --out process",
    )
    work(python, folder, {"": commands})
    for kind in ("pairwise", "bce", "process"):
        (folder / kind / "model").rename(folder / f"{kind}-model")
    (folder / "sft" / "model").rename(folder / "policy")
    for name in ("sft", "pairwise", "bce", "process"):
        shutil.rmtree(folder / name)


def write_checkpoint(folder: Path, family: str, seed: int) -> None:
    """Write a Hugging Face folder with random weights; the tokenizer has one token a character."""
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Sequence", "decoders": []},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "chat_template": TEMPLATE}
    config = SIZES | {"model_type": family, "tie_word_embeddings": family == "qwen3"}
    contents = {"tokenizer": tokenizer, "tokenizer_config": named, "config": config}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_tensors(folder / "model.safetensors", shapes(family), random.Random(seed))


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights, as Hugging Face models have them."""
    width, inner, vocab = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    query, key = (SIZES[f"num_{name}_heads"] * SIZES["head_dim"] for name in ("attention", "key_value"))
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(SIZES["num_hidden_layers"]):
        layer, heads = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        found |= {layer + name: (width,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        found |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj.weight": (width, inner), f"{heads}o_proj.weight": (width, query)}
        for name, size in (("q", query), ("k", key), ("v", key)):
            found[f"{heads}{name}_proj.weight"] = (size, width)
            if family == "qwen2":
                found[f"{heads}{name}_proj.bias"] = (size,)
        if family == "qwen3":
            found |= {f"{heads}{name}_norm.weight": (SIZES["head_dim"],) for name in ("q", "k")}
    return found if family == "qwen3" else found | {"lm_head.weight": (vocab, width)}


def write_tensors(file: Path, shapes: dict[str, tuple[int, ...]], rng: random.Random) -> None:
    """Write a safetensors file with random fp32 weights: norms around 1, all others around 0."""
    header, data = {}, array("f")
    for name, shape in shapes.items():
        start, scale = len(data), 0.3 if len(shape) == 1 or "embed" in name else shape[1] ** -0.5
        data.extend(("norm" in name) + rng.gauss(0, scale) for _ in range(shape[0] * (shape[1:] or (1,))[0]))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (4 * start, 4 * len(data))}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data.tobytes())


def write_data(folder: Path) -> None:
    """Write data of every format on sums of two digits: some answers guess, `~7`, others show their work, `3,4\\n7`."""
    rng = random.Random(0)
    sums = [(a, b, f"{a}+{b}=", f"{a},{b}\n{a + b}", f"~{rng.randint(0, 18)}") for a in range(10) for b in range(10)]
    some = rng.sample(sums, 24)
    ask = {i: [{"role": "user", "content": f"what is {a} + {b}?"}] for i, (a, b, *_) in enumerate(some)}
    lines: dict[str, list[dict]] = {
        "sums": [
            {"prompt": p, "completion": rng.choice((work, guess))} for _, _, p, work, guess in sums for _ in range(4)
        ],
        "talks": [
            {
                "messages": [
                    *([{"role": "system", "content": "be brief."}] if i % 3 else []),
                    *ask[i],
                    {"role": "assistant", "content": guess, **({"weight": 0} if i % 4 == 0 else {})},
                    {"role": "user", "content": "sure?"},
                    {"role": "assistant", "content": work},
                ]
            }
            for i, (_, _, _, work, guess) in enumerate(some)
        ],
        "texts": [{"text": p + work} for _, _, p, work, _ in some],
        "questions": [{"prompt": ask[i], "answer": a + b} for i, (a, b, *_) in enumerate(some)],
        "pairs": [
            {"prompt": p, "chosen": work, "rejected": guess, "margin": i % 3 / 2}
            for i, (_, _, p, work, guess) in enumerate(some)
        ],
        "chats": [
            {"prompt": ask[i], "chosen": work, "rejected": guess} for i, (_, _, _, work, guess) in enumerate(some)
        ],
        "lists": [
            {"prompt": p, "responses": [guess, work, str(a), f"({b})"], "scores": [0, 1, 0.5, 0.5]}
            for a, b, p, work, guess in some
        ],
        "labels": [
            {"prompt": p, "completion": text, "label": label}
            for _, _, p, work, guess in some
            for text, label in ((work, 1), (guess, 0), (guess + "0", 0))
        ],
        "steps": [
            {"prompt": p, "steps": text.split("\n"), "labels": labels}
            for _, _, p, work, guess in some
            for text, labels in ((work, [1, 1]), (f"({guess}\n{guess}\n1", [0.25, None, 0]))
        ],
        "triples": [
            {"prompt": p, "completion": f"{a},{j}\n{a + j}", "reward": (a + j) % 3 or None}
            for a, _, p, *_ in some[:6]
            for j in range(4)
        ],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)


# ---- cases -----------------------------------------------------------------------------------------------------------

TASK = "--task arithmetic:op=sum,digits=1,style=plain"
SHORT = "--steps 3 --save-every 1 --warmup 1 --lr 3e-3 --micro-batch-tokens 90 --out run"
POLICY = (
    f"{SHORT} {TASK} --model material/policy --prompts 4 --group 4 --max-tokens 8 --slots 5 --shown 3 "
    "--eval-every 2 --eval-prompts 3 --eval-samples 2"
)
SPREAD = "--rewards material/rewards.py:spread=0.5"  # every preset has something to learn from every prompt
MISTAKES = "mistakes"  # the case whose commands end with a sentence
CASES: dict[str, Iterable[str]] = {
    "sft": ("sft --model material/random --data material/sums.jsonl --batch 6 " + SHORT, "resume sft"),
    "sft_talks": (
        "sft --model material/other --data material/talks.jsonl --batch 4 --schedule linear --recompute " + SHORT,
    ),
    "sft_last_turn": (
        f"sft --model material/random --data material/talks.jsonl --batch 4 --loss-on last --system hello. {SHORT}",
    ),
    "sft_texts": (f"sft --model material/random --data material/texts.jsonl --batch 4 --schedule constant {SHORT}",),
    "sft_bfloat16": (
        f"sft --model material/random --data material/sums.jsonl --batch 6 --dtype bfloat16 {SHORT}",
        "resume sft",
    ),
    **{
        preset: (f"grpo {POLICY} {SPREAD} --preset {preset}",)
        for preset in (
            *("reinforce", "rloo", "reinforce++", "ppo_actor_only", "grpo", "dr_grpo", "gspo", "cispo", "sapo"),
            *("scaling_grpo", "dual_clip"),
        )
    },
    **{  # in bfloat16, where sampler and trainer disagree; some weights are beyond this cap
        preset: (f"grpo {POLICY} {SPREAD} --preset {preset} --dtype bfloat16 --loss.importance-cap 1.001",)
        for preset in ("tis", "mis")
    },
    **{
        preset: (f"grpo {POLICY} --rewards material/rewards.py:lines=0.5 --preset {preset}", "resume grpo")
        for preset in ("grpo_ps", "gspo_token")
    },
    "online_rft": (f"grpo {POLICY} --preset online_rft",),
    "dapo": (f"grpo {POLICY} --preset dapo --max-gen-batches 4 --overlong-cache 3", "resume grpo"),
    "process_model": (f"grpo {POLICY} --preset grpo_ps --rewards model:material/process-model=1",),
    "grpo_bfloat16": (f"grpo {POLICY} {SPREAD} --preset grpo --dtype bfloat16", "resume grpo"),
    "reference_reset": (
        f"grpo {POLICY} {SPREAD} --preset rloo --kl-in-reward 0.2 --adaptive-kl ziegler --kl-horizon 50 "
        "--ref-reset-every 2 --schedule linear --weight-decay 0.01",
        "resume grpo",
    ),
    "truncated_sampling": (
        f"grpo {POLICY} {SPREAD} --top-p 0.9 --top-k 12 --min-p 0.02 --temperature 0.8 --epochs 2 --mini-batches 2 "
        "--target-kl 0.02 --loss.importance seq_truncate --loss.entropy-quantile 0.6",
        "resume grpo",
    ),
    "stored": (f"grpo {POLICY} --data material/triples.jsonl --epochs 2",),
    "stored_logprobs": (
        f"grpo {POLICY} --data material/outcomes/samples.jsonl --loss.importance geo_mask --loss.opsm-delta 0.01 "
        "--mini-batches 2",
        "resume grpo",
    ),
    "truncation_mask": (f"grpo {POLICY} {SPREAD} --max-tokens 6 --truncation mask --exclude-from-baseline",),
    "truncation_penalty": (
        f"grpo {POLICY} --max-tokens 6 --truncation penalty --loss.aggregation group_token_mean --loss.kl k2 "
        "--loss.kl-coef 0.1 --loss.entropy-coef 0.01 --recompute --rewards overlong:6:2=0.5",
    ),
    "chat": (
        f"grpo {POLICY} {SPREAD} --task material/questions.jsonl --max-tokens 12 --system brief. --stop . "
        "--loss.importance seq_mask --advantage reinforce --baseline group_mean --gamma 0.9",
    ),
    "faults": (f"grpo {POLICY} --rewards material/rewards.py:faulty=0.5 --on-bad-reward skip",),
    "frozen_model": (f"grpo {POLICY} --rewards correct=0 model:material/pairwise-model=1 format=0.1",),
    **{
        f"online_{kind}": (
            f"grpo {POLICY} --rewards correct=0.2 model:material/{kind}-model=1 --refresh.every 1 --refresh.lr 1e-3 "
            "--refresh.memory 5 --refresh.epochs 2 --refresh.batch 3 --refresh.replay 0.3",
            "resume grpo",
        )
        for kind in ("bce", "pairwise")
    },
    "ppo": (f"ppo {POLICY} {SPREAD} --epochs 2 --critic-lr 1e-2", "resume ppo"),
    "ppo_shared": (f"ppo {POLICY} {SPREAD} --critic shared --epochs 2 --mini-batches 2", "resume ppo"),
    "ppo_penalty": (f"ppo {POLICY} {SPREAD} --preset ppo_penalty", "resume ppo"),
    "ppo_warmup": (
        f"ppo {POLICY} {SPREAD} --critic-warmup 1 --bootstrap-truncated --max-tokens 6 --target-kl 0.01 --lam 0.8 "
        "--critic-from material/pairwise-model --no-whiten --value-clip None --dtype bfloat16",
        "resume ppo",
    ),
    "ppo_shared_warmup": (
        f"ppo {POLICY} {SPREAD} --critic shared --critic-warmup 1 --truncation mask --max-tokens 6 --epochs 1",
    ),
    **{
        f"{kind.partition(' ')[0]}_{data}": (
            f"prefer --model material/policy --data material/{data}.jsonl --loss.kind {kind} --batch 5 --eval-every 2 "
            + SHORT,
        )
        for kind in ("dpo", "robust --loss.label-smoothing 0.2", "hinge", "ipo", "rrhf")
        for data in ("pairs", "lists")
    },
    "dpo_chats": (
        "prefer --model material/other --data material/chats.jsonl --loss.label-smoothing 0.1 --loss.length-power 0.5 "
        f"--batch 5 --max-length 40 --recompute --eval-share 0.2 {SHORT}",
        "resume prefer",
    ),
    "rrhf_mean": (
        "prefer --model material/policy --data material/lists.jsonl --loss.kind rrhf --loss.ft token_mean --batch 5 "
        + SHORT,
        "resume prefer",
    ),
    **{
        f"reward_{name}": (
            f"reward --model material/policy --batch 5 --eval-every 2 {options} {SHORT}",
            "resume reward",
        )
        for name, options in {
            "pairs": "--data material/pairs.jsonl --reference material/sums.jsonl",
            "lists": "--data material/lists.jsonl --center 0.01 --head mlp --share 2",
            "outcomes": "--data material/outcomes/pairs.jsonl --recompute",
            "pointwise": "--data material/labels.jsonl --kind pointwise",
            "bce": "--data material/labels.jsonl --kind bce --no-balance --heldout-data material/outcomes/labels.jsonl",
            "process": "--data material/steps.jsonl --kind process --dtype bfloat16",
        }.items()
    },
    "outcomes": (f"outcomes --model material/policy {TASK} --prompts 8 --samples 5 --max-tokens 9 --out run",),
    "outcomes_matched": (
        f"outcomes --model material/policy {TASK} --prompts 8 --samples 5 --max-tokens 9 --match-length --no-balance "
        "--distinct numbers --max-per-prompt 1 --top-p 0.9 --slots 3 --out run",
    ),
    "rft": (
        f"rft --model material/policy {TASK} --prompts 12 --samples 4 --max-tokens 9 --batch 4 {SHORT}",
        "resume rft",
    ),
    "eval": (
        f"eval --model material/policy --compare material/other {TASK} --prompts 6 --samples 3 --max-tokens 9 "
        "--out run",
        f"eval --model material/policy --scorer material/rewards.py:odd {TASK} --prompts 6 --samples 3 --max-tokens 9 "
        "--top-p 0.9 --ties first --json --out run2",
    ),
    "generate": (
        "generate --model material/policy --prompts 3+4= 9+9= --raw --n 3 --max-tokens 9 --json",
        "generate --model material/policy --prompts hello. --n 2 --max-tokens 9 --temperature 0.7 --top-k 9 "
        "--min-p 0.05 --stop ~ --slots 2",
        "generate --model material/other --prompts 3+4= --raw --max-tokens 9 --temperature 0 --dtype bfloat16 --json",
    ),
    "check": (
        "check sft --model material/other --data material/talks.jsonl",
        "check prefer --model material/policy --data material/lists.jsonl",
        "check reward --model material/policy --data material/steps.jsonl --kind process",
        f"check outcomes --model material/policy {TASK} --max-tokens 9",
        f"check rft --model material/policy {TASK} --max-tokens 9",
        f"check grpo {POLICY} {SPREAD} --preset dapo",
        f"check grpo {POLICY} --data material/triples.jsonl",
        f"check ppo {POLICY} --critic shared",
    ),
    "demo": ("demo --seeds 0 --sft-steps 3 --grpo-steps 1 --out run",),
    MISTAKES: (
        "",
        "train",
        "check eval",
        f"grpo {POLICY} --presett grpo",
        f"grpo {POLICY} --preset ppo",
        f"grpo {POLICY} --group 1",
        f"grpo {POLICY} --lr -1",
        f"grpo {POLICY} --task arithmatic",
        f"grpo {POLICY} --rewards correctt=1",
        f"grpo {POLICY} --rewards material/rewards.py:faulty=1",
        f"grpo {POLICY} --refresh.every 1",
        f"grpo {POLICY} --data material/pairs.jsonl",
        f"grpo {POLICY} --loss.kl k4",
        f"grpo {POLICY} --model material/nowhere",
        f"grpo {POLICY} --model material/bce-model",
        f"grpo {POLICY} --task material/questions.jsonl:prompt_column=question",
        f"ppo {POLICY} --lam 2",
        f"ppo {POLICY} --critic-warmup 3",
        f"ppo {POLICY} --critic shared --critic-from material/policy",
        "grpo --resume --out nowhere",
        f"sft --model material/policy --data material/pairs.jsonl {SHORT}",
        f"prefer --model material/policy --data material/sums.jsonl {SHORT}",
        f"prefer --model material/policy --data material/pairs.jsonl --loss.beta 0 {SHORT}",
        f"reward --model material/policy --data material/pairs.jsonl --kind bce {SHORT}",
        f"reward --model material/policy --data material/labels.jsonl --kind bce --center 0.1 {SHORT}",
        f"outcomes --model material/policy {TASK} --samples 1",
        f"rft --model material/other {TASK} --prompts 2 --samples 1 --max-tokens 2 --out run2",
        "eval --model material/policy --scorer model:material/bce-model",
        "generate --model material/policy --prompts",
        "report --run nowhere",
    ),
}

# ---- running ---------------------------------------------------------------------------------------------------------


def run(python: str, out: Path, material: Path, wanted: str) -> None:
    """Run the cases whose names fit the pattern `wanted`, and write OUT/digests.json."""
    if not material.exists():
        unfinished = material.with_name(f".{material.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make_material(unfinished, python)
        unfinished.rename(material)
    cases = {name: commands for name, commands in CASES.items() if fnmatch.fnmatch(name, wanted)}
    for name in cases:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        (out / name / "material").symlink_to(material.resolve())
    work(python, out, cases)
    found = {name: digest(out / name) for name in cases}
    for name, files in found.items():
        exits = [held for file, held in files[OUTPUT].items() if file.endswith(".exit")]
        failed = sum(held != ["0"] for held in exits)
        if failed and name != MISTAKES:
            print(f"{name}: {failed} of {len(exits)} commands failed")
        if files.get("resumed"):
            print(f"{name}: resumed, it differs:", *files["resumed"], sep="\n    ")
    content = {"material": digest(material), "cases": found}
    (out / "digests.json").write_text(json.dumps(content, indent=0, ensure_ascii=False))
    print(f"{len(found)} cases: {out / 'digests.json'}")


def work(python: str, root: Path, cases: dict[str, Iterable[str]]) -> None:
    """Run the commands of each case in the folder of its name, in a process of that interpreter."""
    words = [os.path.abspath(python), "-P", str(Path(__file__).resolve()), "work", json.dumps(cases)]
    subprocess.run(words, cwd=root, env=os.environ | ENVIRONMENT, check=True)


def work_here(cases: dict[str, list[str]]) -> None:
    """Run the commands of each case, each in a fork of this process; the body of the process that `work` starts."""
    warm()
    print(f"minirl is {sys.modules['minirl'].__file__}")
    root = Path.cwd()
    for name, commands in cases.items():
        os.chdir(root / name)
        started = time.monotonic()
        for number, command in enumerate(commands, 1):
            words = shlex.split(command)
            if words[:1] == ["resume"]:
                cut_short(Path("run"), Path("resumed"))
                words = [words[1], "--resume", "--out", "resumed"]
            code = forked(words, str(number))
            if code and name != MISTAKES:
                print(f"{name}: exit code {code} of minirl {command}\n{Path(f'{number}.err').read_text()}")
        print(f"{time.monotonic() - started:5.1f} s  {name}", flush=True)
    os._exit(0)  # as in `forked`


def warm() -> None:
    """Import all that the commands need, for the forks of this process, and leave plots and the disk's pace out."""
    with contextlib.redirect_stdout(io.StringIO()):
        sys.argv = ["minirl", "--help"]
        runpy.run_module("minirl", run_name="__main__")
    import matplotlib.axes
    import matplotlib.figure
    import torch._dynamo  # noqa: F401 - half of the time of a short case, if each imports it

    matplotlib.axes.Axes.grid, matplotlib.figure.Figure.savefig = lambda *args, **options: None, empty_plot
    os.fsync = lambda file: None
    gc.freeze()  # else the collector of each fork copies the pages of all modules


def forked(words: list[str], log: str) -> int:
    """Run `python -m minirl` in a fork of this process and return its exit code. LOG.out, LOG.err and LOG.exit keep
    its output and the code."""
    code = os.waitstatus_to_exitcode(os.waitpid(started(words, log), 0)[1])
    Path(f"{log}.exit").write_text(str(code))
    return code


def started(words: list[str], log: str, before: Callable[[], object] = lambda: None) -> int:
    """Start `python -m minirl` in a fork of this process and return its number. The fork calls `before` first."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv, code = ["minirl", *words], 0
    try:
        before()
        runpy.run_module("minirl", run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # ends the workers of the sandbox; clearing all modules away would take a second
    sys.stdout.flush()
    os._exit(code)


def empty_plot(figure, target, **options) -> None:
    """Stand in for `Figure.savefig`: plots are not compared, and drawing takes longer than the training."""
    if isinstance(target, str | Path):
        Path(target).touch()


def cut_short(run: Path, copy: Path) -> None:
    """Make of a finished run one that was killed after its last checkpoint but one."""
    shutil.copytree(run, copy)
    shutil.rmtree(max((copy / "checkpoints").iterdir()))
    for folder in copy.glob("*model"):
        shutil.rmtree(folder)


# ---- digests ---------------------------------------------------------------------------------------------------------

Digest = dict[str, dict[str, object]]  # file -> name of a tensor, metric, ... -> what it holds


def digest(folder: Path) -> Digest:
    """Read all files below a folder, except the material and those LEFT_OUT."""
    found: Digest = {OUTPUT: {}}
    for place, folders, files in os.walk(folder):  # does not follow the link to the material
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for file in (Path(place) / name for name in sorted(files)):
            name = str(file.relative_to(folder))
            if file.suffix in (".out", ".err", ".exit"):
                found[OUTPUT][name] = output(file, folder.resolve())
            elif file.suffix not in LEFT_OUT and name != "digests.json":
                found[name] = READERS.get(file.suffix, other)(file)
    resumed = {name: found.pop(name) for name in list(found) if name.startswith("resumed/")}
    if resumed:
        once = {"resumed" + name.removeprefix("run"): held for name, held in found.items() if name.startswith("run/")}
        found["resumed"] = {": ".join(line): "differs from the run in one go" for line in differences(once, resumed)}
    return found


def tensors(file: Path) -> dict[str, object]:
    """Return dtype, shape and a hash of the bytes of each tensor of a safetensors file."""
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    found = {"__metadata__": header.pop("__metadata__", None)}
    for name, about in header.items():
        first, last = about["data_offsets"]
        found[name] = f"{about['dtype']} {about['shape']} {short_hash(content[start + first : start + last])}"
    return found


def records(file: Path) -> dict[str, object]:
    """Return the columns of a JSONL file: the values of each key, line by line."""
    rows = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    names = dict.fromkeys(name for row in rows for name in row if not name.startswith(MEASURED))
    return {name: [shortened(row[name]) if name in row else ABSENT for row in rows] for name in names}


def fields(file: Path) -> dict[str, object]:
    """Return the fields of a JSON file, those of objects in it as outer.inner."""
    return dict(flat(json.loads(file.read_bytes())))


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield name, shortened(value)
        return
    for key, inner in value.items():
        if not key.startswith(MEASURED):
            yield from flat(inner, f"{name}.{key}" if name else key)


def output(file: Path, folder: Path) -> object:
    """Return the lines that a command printed, without times, sizes and the place of its folder; of stderr only the
    sentence on which it ended, as progress goes there too."""
    text = file.read_text(errors="replace").replace(str(folder), ".")
    for pattern, mask in MASKED:
        text = pattern.sub(mask, text)
    return [line for line in text.splitlines() if file.suffix != ".err" or line.startswith("minirl: ")]


def other(file: Path) -> dict[str, object]:
    return {"bytes": short_hash(file.read_bytes())}


READERS = {".safetensors": tensors, ".jsonl": records, ".json": fields}


def shortened(value: object) -> object:
    """Return a value as it is, or a hash of a long one."""
    text = json.dumps(value)
    return value if len(text) < 100 else short_hash(text.encode())


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


# ---- comparing -------------------------------------------------------------------------------------------------------


def differences(old: Digest, new: Digest) -> Iterator[tuple[str, str]]:
    """Yield each file that is not the same, with each name in it that is not, and the old and the new value."""
    for file in sorted(old.keys() | new.keys()):
        if file not in old or file not in new:
            yield file, f"only in the {'old' if file in old else 'new'} one"
            continue
        for name in dict.fromkeys([*old[file], *new[file]]):
            one, two = old[file].get(name, ABSENT), new[file].get(name, ABSENT)
            if one != two:
                yield file, f"{name}: {change(one, two)}"


def change(one: object, two: object) -> str:
    """Write the two values; of lists the first line that differs."""
    if isinstance(one, list) and isinstance(two, list):
        pairs = list(zip_longest(one, two, fillvalue=ABSENT))
        unequal = [i for i, (a, b) in enumerate(pairs) if a != b]
        a, b = pairs[unequal[0]]
        return f"{len(unequal)} of {len(pairs)} lines, first line {unequal[0] + 1}: {a!r} -> {b!r}"
    return f"{one!r} -> {two!r}"


def compare(old: Path, new: Path, wanted: str, renamed: dict[str, str], ignored: Sequence[str], most: int) -> bool:
    """Print what differs in the cases that fit a pattern, at most so many names of a file, and return whether anything
    does. `renamed` names are read under their new ones; lines that fit one of the patterns `ignored` do not count."""
    contents = [json.loads(file.read_text()) for file in (old, new)]
    chosen = [{name: held for name, held in c["cases"].items() if fnmatch.fnmatch(name, wanted)} for c in contents]
    one, two = ({"material": c["material"], **cases} for c, cases in zip(contents, chosen, strict=True))
    count = 0
    for case in dict.fromkeys([*one, *two]):
        before, after, lines = one.get(case), two.get(case), {}
        if before is None or after is None:
            pairs = [("", f"only in the {'new' if before is None else 'old'} one")]
        else:
            pairs = differences(
                {file: under(renamed, held, after.get(file, {})) for file, held in before.items()}, after
            )
        for file, text in pairs:
            line = f"{case}: {file}: {text}" if file else f"{case}: {text}"
            if not any(fnmatch.fnmatch(line, pattern) for pattern in ignored):
                lines.setdefault(file, []).append(line)
        for file, found in lines.items():
            print(*found[:most], sep="\n")
            if len(found) > most:
                print(f"{case}: {file}: and {len(found) - most} more")
        count += bool(lines)
    print(f"{count} of {len(one | two) - 1} cases differ" if count else f"all {len(two) - 1} cases are equal")
    return bool(count)


def under(renamed: dict[str, str], old: dict[str, object], new: dict[str, object]) -> dict[str, object]:
    """Return the old file with its names as they are now, where the new file does not have the old ones any more."""
    return {name if name in new else renamed.get(name, name): held for name, held in old.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the cases and write OUT/digests.json")
    runs.add_argument("--python", required=True, help="interpreter in whose environment the checkout is installed")
    runs.add_argument("--out", required=True, type=Path)
    runs.add_argument(
        "--material", required=True, type=Path, help="folder of checkpoints and data; made if it is missing"
    )
    runs.add_argument("--cases", default="*", help="a pattern of their names")
    compares = commands.add_parser("compare", help="name all that differs between two digests.json; exit code 1 if any")
    compares.add_argument("old", type=Path)
    compares.add_argument("new", type=Path)
    compares.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="metrics, tensors or fields")
    compares.add_argument("--ignore", nargs="*", default=[], metavar="PATTERN", help="lines that are no differences")
    compares.add_argument("--cases", default="*", help="a pattern of their names")
    compares.add_argument("--most", type=int, default=3, metavar="N", help="names of a file that are printed")
    commands.add_parser("work").add_argument("cases", type=json.loads)
    given = parser.parse_args()
    if given.command == "work":
        work_here(given.cases)
    elif given.command == "run":
        run(given.python, given.out, given.material, given.cases)
    else:
        renamed = dict(pair.split("=", 1) for pair in given.renamed)
        sys.exit(compare(given.old, given.new, given.cases, renamed, given.ignore, given.most))


if __name__ == "__main__":
    main()
