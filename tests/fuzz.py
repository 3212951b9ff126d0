"""Mutate every file and argument that a command reads, and see that nobody gets a traceback, a hang or a full memory.

    python tests/fuzz.py [--count 4000] [--seed 0] [--jobs 2] [--only NUMBER] [--kinds model,data,arguments,resume]

Each case is a function of the seed and its number. It runs a command in a forked child of a process that has imported
everything, in a folder of its own. The child must end with code 0, or with code 2 and one sentence on stderr; with no
more than 5 s of its processor and 512 MB above what the unmutated command takes; and no file `hacked` may be there.
"""

import argparse
import contextlib
import gc
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

SECONDS, MEGABYTES, PATIENCE = 5, 512, 60
TEMPLATE = (
    "{{ bos_token }}{{ hint }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content | trim }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUN = "--out run --steps 1 --max-tokens 4"
SAMPLED = f"{RUN} --prompts 2 --group 2 --eval-prompts 2 --eval-samples 2"
COMMANDS = {  # what each reads, beside the model
    "generate --model model --prompts 1+2= --max-tokens 2": "",
    "generate --model sharded --prompts 1+2= --max-tokens 2 --template.hint x": "",
    "eval --model model --task task.jsonl:style=chat --samples 2 --max-tokens 2": "task.jsonl",
    f"check grpo --model model --task task.jsonl:style=chat {SAMPLED}": "task.jsonl",
    f"check ppo --model sharded --task task.json:heldout_path=task.jsonl {SAMPLED}": "task.json",
    f"check grpo --model model --task task.jsonl {SAMPLED} --data stored.jsonl": "stored.jsonl",
    f"check grpo --model model --task task.jsonl {SAMPLED} --rewards model:judge=0.5": "task.jsonl",
    "check sft --model model --data sft.jsonl --out run --steps 1": "sft.jsonl",
    "check sft --model sharded --data talks.json --out run --steps 1": "talks.json",
    "check sft --model model --data text.jsonl.gz --out run --steps 1": "text.jsonl.gz",
    "check sft --model model --data folder --out run --steps 1": "folder/a.json",
    "check prefer --model model --data prefer.jsonl --out run --steps 1 --eval-share 0.3": "prefer.jsonl",
    "check prefer --model model --data ranked.json.gz --out run --steps 1 --eval-share 0.3": "ranked.json.gz",
    "check reward --model model --data prefer.jsonl --out run --steps 1 --heldout 0.3": "prefer.jsonl",
    "check reward --model model --kind process --data steps.jsonl --out run --steps 1": "steps.jsonl",
    "sft --resume --out sft-run": "sft-run/config.json",
    "grpo --resume --out grpo-run": "grpo-run/config.json",
    "check sft --model model --data chats.jsonl --out run --steps 1": "chats.jsonl",
    f"check grpo --model model --task humaneval:path=code.jsonl,heldout_fraction=0.5 {SAMPLED}": "code.jsonl",
}
MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MODEL += ("chat_template.jinja", "model.safetensors", "model.safetensors.index.json", "model-1.safetensors")


# --- what is read ----------------------------------------------------------------------------------------------------


def rows() -> dict[str, list[dict]]:
    """Make rows of every kind of data file."""
    ask = {"role": "user", "content": "1+2=?"}
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    tool = {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    n = range(8)
    return {
        "task.jsonl": [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": i} for i in n],
        "task.json": [{"prompt": f"{i}*2=", "answer": i * 2} for i in n],
        "sft.jsonl": [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in n],
        "talks.json": [{"messages": [ask, {"role": "assistant", "content": str(i)}], "tools": [tool]} for i in n],
        "chats.jsonl": [
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": f"{i}?"},
                    {"from": "gpt", "value": "3"},
                    {"from": "human", "value": "Again."},
                    {"from": "function_call", "value": json.dumps(call["function"])},
                ],
                "tools": json.dumps([tool]),
            }
            for i in n
        ],
        "text.jsonl.gz": [{"text": f"a text {i}"} for i in n],
        "folder/a.json": [{"prompt": "1=", "completion": "1"}],
        "prefer.jsonl": [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "no", "margin": 0.5} for i in n],
        "ranked.json.gz": [
            {"prompt": [{"role": "user", "content": f"{i}?"}], "responses": ["3", f"{i}", "x"], "scores": [1, 0.5, -1]}
            for i in n
        ],
        "steps.jsonl": [{"prompt": f"{i}?", "steps": ["a", "b"], "labels": [1, 0.5]} for i in n],
        "stored.jsonl": [
            {"prompt": f"{i % 4}+1=", "completion": f"{i}", "reward": i / 8, "finish_reason": "stop"} for i in range(16)
        ],
        "code.jsonl": [
            {
                "task_id": f"t/{i}",
                "prompt": f"def f{i}(x):\n",
                "entry_point": f"f{i}",
                "test": f"def check(f):\n    assert f(1) == {i}\n",
                "canonical_solution": f"    return {i}\n",
            }
            for i in n
        ],
    }


def write_rows(path: Path, content: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    name = path.name.removesuffix(".gz")
    if path.parent.name == "folder":
        text = json.dumps(content[0])
    else:
        text = json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_all(folder: Path, with_runs: bool = True) -> None:
    """Write models of one file and of two, a reward model, data of every kind, and two runs unless they are unread."""
    from helpers import tiny_config
    from safetensors.torch import load_file, save_file
    from torch.nn import Embedding

    from minirl.lab import cli
    from minirl.model import Transformer
    from minirl.tokenizer import Tokenizer

    Embedding.reset_parameters = lambda layer: None  # files overwrite it; on no device torch would import for seconds
    tokenizer = Tokenizer.from_chars(string.printable)
    tokenizer.chat_template = TEMPLATE
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 16, "max_positions": 512}
    config = tiny_config(vocab_size=tokenizer.vocab_size, **sizes)
    for name in ("model", "sharded", "judge"):
        Transformer(config, scalar_head=name == "judge").initialise(0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        file = folder / name / "tokenizer_config.json"
        listed = {
            "0": {"content": "<pad>", "lstrip": False, "special": True},
            "1": {"content": "<bos>", "special": True},
        }
        templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "x"}]
        more = {"added_tokens_decoder": listed, "additional_special_tokens": ["<bos>"], "chat_template": templates}
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
        (folder / name / "special_tokens_map.json").write_text('{"eos_token": {"content": "<eos>", "lstrip": false}}')
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    whole = folder / "sharded" / "model.safetensors"
    tensors = load_file(whole)
    half = dict(list(tensors.items())[:5])
    save_file(half, folder / "sharded/model-1.safetensors")
    save_file({name: x for name, x in tensors.items() if name not in half}, folder / "sharded/model-2.safetensors")
    places = {name: f"model-{1 if name in half else 2}.safetensors" for name in tensors}
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    whole.unlink()
    for name, content in rows().items():
        write_rows(folder / name, content)
    for line in list(COMMANDS)[:4]:  # what parsing imports is there before children are forked
        command, *args = line.removeprefix("check ").split()
        cli.parse(command, args)
    for line in (
        "sft --model model --data sft.jsonl --out sft-run --steps 1",
        f"grpo --model model --task task.jsonl {SAMPLED.replace('run', 'grpo-run')}",
    ) * with_runs:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            cli.main(line.split())


# --- mutations -------------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    -0.0,
    1e30,
    1e308,
    2**31,
    2**53,
    2**63,
    2**64,
    10**30,
    -(10**30),
    "",
    " ",
    "1",
]
VALUES += [
    "x",
    "\udcff",
    "\ud83d",
    "\0",
    "a" * 5000,
    "é",
    "../../etc/passwd",
    "{{ 'a' * 10**9 }}",
    [],
    {},
    [[]],
    [None],
]
VALUES += [
    {"a": None},
    [1, "a", None],
    {"content": 3},
    [2**63],
    ["\udcff"],
    float("nan"),
    float("inf"),
    [[[[[[1]]]]]],
    10**4000,
]
RAW = [
    "9" * 5000,
    "-" + "9" * 5000,
    "1e999",
    "[" * 50000,
    '{"a":' * 5000,
    "[" * 300 + "]" * 300,
    "NaN",
    "-Infinity",
    '"\\ud800"',
]
RAW += [
    '"\\u0000"',
    "0x10",
    "1_000",
    "'a'",
    '"' + "a" * 300000 + '"',
    "tru",
    "[1,]",
    '{"a": 1, "a": 2}',
    '"\t"',
    "1" * 310 + ".5",
]


def places(value, path=()) -> list[tuple]:
    """List the paths to every value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        found += places(inner, (*path, key))
    return found


def mutated_value(rng: random.Random, value) -> str:
    """Return a JSON text with one value replaced, removed, doubled or written in an unusual way."""
    path = rng.choice(places(value))
    mark = "\x01mark\x01"
    if not path:
        return rng.choice([*RAW, json.dumps(rng.choice(VALUES))])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    how = rng.randrange(8)
    if how == 0:
        del holder[path[-1]]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "\udcff", "x" * 1000, "0", "content", str(2**70), *holder])] = holder.pop(path[-1])
    elif how == 2:
        other = value
        for key in rng.choice(places(value)):
            other = other[key]
        holder[path[-1]] = json.loads(json.dumps(other))
    elif how == 3:
        holder[path[-1]] = mark
        return json.dumps(value).replace(json.dumps(mark), rng.choice(RAW))
    elif how == 4 and isinstance(holder, dict):
        text, key = json.dumps(value), json.dumps(path[-1])
        return text.replace(f"{key}:", f"{key}: {json.dumps(rng.choice(VALUES))}, {key}:", 1)
    else:
        holder[path[-1]] = rng.choice(VALUES)
    return json.dumps(value)


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with flipped bits, parts cut, moved, doubled or overwritten."""
    out = bytearray(content)
    at, length = rng.randrange(len(out) + 1), rng.choice([1, 2, 8, 100, 4096])
    match rng.randrange(10):
        case 0:
            for _ in range(rng.choice([1, 3, 30])):
                if out:
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            del out[at:]
        case 2:
            del out[at : at + length]
        case 3:
            out[at : at + length] = bytes(length)
        case 4:
            out[at:at] = rng.randbytes(length)
        case 5:
            out[at:at] = out[: rng.randrange(len(out) + 1)]
        case 6:
            return (
                rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\x80", b"\n\n", b"[", b"\0" * 5000]) + content
            )
        case 7:
            return rng.choice(
                [b"", b"\n", b"\0" * 100000, b"[" * 100000, b"null", b"[]", b"{}", b'""', b"\xff" * 100, b"PK\3\4"]
            )
        case 8:
            text = content.decode("latin-1")
            return text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"]))
        case 9:
            for _ in range(20):
                out += out[at : at + 100]
    return bytes(out)


def mutated_header(rng: random.Random, content: bytes) -> bytes:
    """Return a safetensors file with another header or another size of it."""
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if rng.random() < 0.2:
        size = rng.choice([0, 1, size + 1, size - 1, 2**31, 2**63, 2**64 - 1, 100_000_001, len(content)])
        return size.to_bytes(8, "little") + content[8:]
    name = rng.choice(list(header))
    match rng.randrange(6):
        case 0 if "dtype" in header[name]:
            header[name]["dtype"] = rng.choice(["F64", "I64", "BOOL", "U8", "F16", "BF16", "F8_E4M3", "X", "", 3, None])
        case 1 if "shape" in header[name]:
            header[name]["shape"] = rng.choice(
                [[], [0], [2**63, 2], [2**40, 2**40], [-1], ["a"], None, [1] * 1000, [1, 1]]
            )
        case 2 if "data_offsets" in header[name]:
            header[name]["data_offsets"] = rng.choice(
                [[0, 0], [0, 2**63], [2**64, 0], [-1, 4], [8, 4], [], None, [0, len(body) + 4]]
            )
        case 3:
            header[rng.choice(["", "x", "\udcff", "lm_head.weight"])] = header.pop(name)
        case _:
            text = mutated_value(rng, header).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + body
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def replaced_by_another(rng: random.Random, file: Path) -> None:
    """Put a folder, a pipe, a device, a link, or a file that unpacks to a large one in place of a file."""
    file.unlink()
    match rng.randrange(8):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/null", "/dev/stdin", "/proc/self/mem"]))
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.symlink_to("nowhere")
        case 5:
            file.write_bytes(gzip.compress(rng.choice([b"\0", b"\n", b"[],", b'{"text": "a"}\n']) * 3_000_000))
        case 6:
            os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 2**33)  # 8 GB of zeros that take no space
        case 7:
            pass  # it is gone


def mutate_file(rng: random.Random, file: Path) -> str:
    """Change a file in one of the ways of its kind."""
    how, content = rng.random(), file.read_bytes()
    if how < 0.06:
        replaced_by_another(rng, file)
        return "replaced"
    if how < 0.3:
        file.write_bytes(mutated_bytes(rng, content))
        return "bytes"
    packed = file.suffix == ".gz"
    text = gzip.decompress(content) if packed else content
    if file.suffix == ".safetensors":
        new = mutated_header(rng, content)
    elif file.suffix == ".jinja":
        new = mutated_template(rng, content.decode()).encode("utf-8", "surrogatepass")
    elif file.name.removesuffix(".gz").endswith(".jsonl"):
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = mutated_value(rng, json.loads(lines[i])).encode("utf-8", "surrogatepass")
        new = b"\n".join(lines)
    else:
        new = mutated_value(rng, json.loads(text)).encode("utf-8", "surrogatepass")
    file.write_bytes(gzip.compress(new) if packed else new)
    return "content"


def mutated_template(rng: random.Random, template: str) -> str:
    """Return a template with a piece put in, doubled or taken away."""
    pieces = [
        "{{ 'a' * 10**9 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% break %}",
        "{{ messages * 10**6 }}",
        "{{",
        "%}",
    ]
    pieces += [
        "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
        "{% include 'x' %}",
        "(" * 2000,
        "\udcff",
        "{{ 9**9**9 }}",
    ]
    pieces += [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages | sort }}",
        "{{ raise_exception(messages) }}",
        "{#",
    ]
    at, to = sorted(rng.randrange(len(template) + 1) for _ in range(2))
    middle = rng.choice(["", template[at:to] * 2, rng.choice(pieces), rng.choice(pieces)])
    return template[:at] + middle + template[rng.choice([at, to]) :]


TEXTS = [
    "",
    " ",
    "\udcff",
    "\n",
    "nan",
    "inf",
    "-inf",
    "1e38",
    "1e400",
    "-1",
    "0",
    "1",
    "2",
    "9" * 30,
    "9" * 5000,
    "1e-400",
    "0x10",
    "é",
]
TEXTS += [
    "none",
    "None",
    "true",
    "cpu",
    "cuda",
    "cuda:" + "9" * 30,
    "5",
    "/dev/zero",
    "..",
    "/",
    ".",
    "model",
    "a=b",
    "a=nan",
    "=",
    ":",
]
TEXTS += [
    "x" * 300,
    "x" * 5000,
    "[" * 5000,
    "{",
    "\ud800",
    "task.jsonl",
    "sft.jsonl:limit=99999999999999999999",
    "arithmetic:digits=-1",
]
TEXTS += [
    "arithmetic:digits=" + "9" * 5000,
    "task.jsonl:heldout_fraction=nan",
    "arithmetic:train_size=99999999999",
    "model:model=1",
    "model:=1",
]
TEXTS += [
    "correct=1e38",
    "correct=1e400",
    "x.py:f=1",
    "overlong:1:2=1",
    "overlong:-1:" + "9" * 400 + "=1",
    "a/b",
    "a/b:c",
    "countdown:numbers=99",
]
TEXTS += [
    "arithmetic:template={a.__class__}{b}",
    "arithmetic:template={a:>99999999999}{b}",
    "reasoning_gym:dataset=\udcff",
    "a\0b",
    "~",
    "*",
]


def mutated_arguments(rng: random.Random, args: list[str]) -> list[str]:
    """Return arguments with values of options changed or added, or one left away, doubled or cut."""
    from minirl.lab import cli

    command = next(arg for arg in args if arg != "check")
    for _ in range(rng.choice([1, 1, 1, 2])):
        options = [*cli._options(cli.COMMANDS[command][0]), "--template.x", "--nothing"]
        # A run of many steps is no fault, nor is a large model of the demo: they are left as they are.
        options = [o for o in options if o not in ("--steps", "--out", "--sft-steps", "--grpo-steps", "--seeds")]
        match rng.randrange(8):
            case 0:
                args = args[: rng.randrange(1, len(args) + 1)]
            case 1:
                at = rng.randrange(min(1, len(args) - 1), len(args))
                args = [*args[:at], rng.choice(TEXTS), *args[at + 1 :]]
            case 2:
                args = [*args, f"{rng.choice(options)}={rng.choice(TEXTS)}"]
            case _:
                args = [*args, rng.choice(options), *rng.choices(TEXTS, k=rng.choice([0, 1, 1, 1, 1, 2]))]
    return args


# --- a case ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A command with something changed."""

    number: int
    args: list[str]
    what: str


KINDS = ("model", "data", "arguments", "resume")


def make(seed: int, number: int, folder: Path, kinds=KINDS) -> Case:
    """Fill a folder, change something in it or in the arguments, and return the case."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(kinds)
    lines = [line for line in COMMANDS if ("--resume" in line) == (kind == "resume")]
    line = rng.choice(lines)
    args, data = line.split(), COMMANDS[line]
    if kind == "arguments":
        return Case(number, mutated_arguments(rng, args), "arguments")
    if kind == "model":
        model = "judge" if "judge" in line and rng.random() < 0.5 else args[args.index("--model") + 1]
        name = f"{model}/{rng.choice([n for n in MODEL if (folder / model / n).is_file()])}"
    else:
        name = data or "model/config.json"
    changed = mutate_file(rng, folder / name)
    if kind == "resume" and (folder / name).is_file() and not (folder / name).is_symlink():
        text = (folder / name).read_bytes()[: 1 << 20]
        (folder / name).write_bytes(re.sub(rb'"steps": *[0-9.e+]+', b'"steps": 1', text))  # many steps are no fault
    return Case(number, args, f"{name}: {changed}")


def run(args: list[str], folder: Path) -> dict:
    """Run a command in a forked child; return its exit code, stderr, seconds, megabytes, and whether it had to be
    killed."""
    out, err = folder / ".stdout", folder / ".stderr"
    child = os.fork()
    if not child:
        code = 99
        try:
            signal.alarm(PATIENCE)
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", errors="backslashreplace", closefd=False) for n in (1, 2))
            from minirl.lab import cli, commands, display

            commands.draw, display.PATIENCE = (lambda config: None), 1e9  # pictures take a second each
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (4 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))  # so that a fault of this cannot end the machine
            try:
                cli.main(args)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
            (folder / ".cost").write_text(f"{time.process_time() - start} {grown}")
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    cost = (folder / ".cost").read_text().split() if (folder / ".cost").exists() else ("0", "0")
    said = err.read_text(encoding="utf-8", errors="replace") if err.exists() else ""
    return {"code": code, "said": said, "seconds": float(cost[0]), "grown": int(cost[1])}


def fault(found: dict, honest: dict, folder: Path) -> str:
    """Say what is wrong with an outcome, "" for nothing."""
    lines = found["said"].splitlines()
    if (folder / "hacked").exists():
        return "code was run"
    if found["code"] == -signal.SIGALRM:
        return "hang"
    if found["code"] not in (0, 2):
        return f"exit code {found['code']}: {lines[-1] if lines else ''}"
    if "Traceback" in found["said"] or "panicked" in found["said"]:
        return "traceback beside the sentence"
    if found["code"] == 2 and (len(lines) != 1 or not lines[0].startswith("minirl: ")):
        return "no sentence alone"
    if found["seconds"] > honest["seconds"] + SECONDS:
        return f"{found['seconds']:.0f} s"
    if found["grown"] > honest["grown"] + MEGABYTES:
        return f"{found['grown']} MB"
    return ""


def honest_costs(folder: Path) -> dict:
    """Run every command as it is; they must all end well."""
    worst = {"seconds": 0.0, "grown": 0}
    for line in COMMANDS:
        with copied(folder) as place:
            found = run(line.split(), place)
        if found["code"]:
            raise SystemExit(f"the unmutated command fails: {line}\n{found['said']}")
        worst = {name: max(worst[name], found[name]) for name in worst}
    return worst


@contextlib.contextmanager
def copied(folder: Path):
    place = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        shutil.copytree(folder, place / "x")
        yield place / "x"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def tried(folder: Path, honest: dict, seed: int, kinds, loud: bool, number: int) -> tuple[str, Counter, float, int]:
    """Run one case; return what was wrong with it, what it was, its seconds and megabytes."""
    with copied(folder) as place:
        case = make(seed, number, place, kinds)
        found = run(case.args, place)
        wrong = fault(found, honest, place)
    tail = found["said"].strip().splitlines()[-1:] or [""]
    line = (
        f"case {number} ({case.what}): {wrong}\n    {' '.join(case.args)[:300]!r}\n    {tail[0][:300]}" if wrong else ""
    )
    if loud:
        print(f"{case}\n{found['code']} {found['seconds']:.2f} s {found['grown']} MB\n{found['said']}")
    return line, Counter([case.what.partition(":")[0], f"exit code {found['code']}"]), found["seconds"], found["grown"]


GENEROUS = {"seconds": 2.0, "grown": 128}  # what honest commands take, where they are not run


say = partial(print, flush=True)


def fuzz(count: int, seed: int, jobs: int, kinds=KINDS, only: int | None = None, quick: bool = False) -> list[str]:
    """Run cases, and return what was wrong with them, a line for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "honest"
        folder.mkdir()
        write_all(folder, with_runs="resume" in kinds)
        honest = GENEROUS if quick else honest_costs(folder)
        say(f"honest commands take up to {honest['seconds']:.1f} s and {honest['grown']} MB")

        gc.collect()
        gc.freeze()  # so that a child copies less memory
        one = partial(tried, folder, honest, seed, kinds, only is not None)
        numbers = [only] if only is not None else range(count)
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            results = []
            for i, result in enumerate(pool.imap(one, numbers), 1):
                results.append(result)
                if result[0]:
                    say(result[0])
                if i % 500 == 0:
                    say(f"{i} cases, {sum(bool(r[0]) for r in results)} faults")
        totals = sum((counts for _, counts, _, _ in results), Counter())
        say(f"{len(results)} cases: {dict(sorted(totals.items()))}")
        say(f"longest {max(r[2] for r in results):.1f} s, largest {max(r[3] for r in results)} MB above the start")
        return [line for line, *_ in results if line]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in (("count", 4000), ("seed", 0), ("jobs", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", type=int, help="run this case alone, and show what it says")
    parser.add_argument("--quick", action="store_true", help="do not measure what honest commands take")
    parser.add_argument("--kinds", default=",".join(KINDS))
    given = parser.parse_args()
    kinds = tuple(given.kinds.split(","))
    faults = fuzz(given.count, given.seed, given.jobs, kinds, given.only, given.quick)
    gc.unfreeze()
    print(f"{len(faults)} faults")
    sys.exit(bool(faults))
