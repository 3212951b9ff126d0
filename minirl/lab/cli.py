"""Read a command line into the config of a command, and run it.

A mistake of the user ends in one sentence on stderr and exit code 2; Ctrl-C saves and ends with 130.
"""

import ast
import contextlib
import inspect
import io
import json
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
import tyro

from minirl.errors import InputError, NoChatTemplate, did_you_mean
from minirl.files import is_number, kind_of
from minirl.grpo import GRPOConfig
from minirl.lab.check import CHECKS
from minirl.lab.commands import COMMANDS
from minirl.lab.tasks import TASKS
from minirl.ppo import PPOConfig
from minirl.presets import preset_defaults
from minirl.run import read_run_config
from minirl.step import is_out_of_memory

GPU = re.compile(  # errors of the GPU and its libraries, of which most have no class
    r"\b(CUDA|HIP|cuDNN|cuBLAS|cuSOLVER|cuFFT|NCCL)( \w+)? error|(CUDNN|CUBLAS|CUSOLVER)_STATUS_|Triton Error", re.I
)
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


GROUPS = {  # of --help, by the names of fields; those that a config takes without a name come before them all
    "most used": "compare out loss_on preset steps prompts group samples batch max_tokens lr rewards",
    "model and task": "data overlong_prompts max_length template system head critic critic_from separator dtype device",
    "how long and how much": "epochs mini_batches share target_kl warmup schedule weight_decay clip_norm on_nonfinite "
    "critic_lr critic_warmup micro_batch_tokens recompute sft_steps grpo_steps",
    "sampling": "n temperature top_k top_p min_p stop slots raw dynamic_sampling max_gen_batches max_per_prompt "
    "distinct match_length",
    "loss": "advantage baseline gamma lam whiten bootstrap_truncated value_clip value_coef drop_zero_advantage center "
    "reference balance loss",
    "reference and KL": "kl_in_reward adaptive_kl kl_target kl_horizon ref_reset_every",
    "rewards": "reward_timeout on_bad_reward truncation truncation_penalty exclude_from_baseline overlong_cache "
    "overlong_penalty refresh",
    "evaluation": "scorer ties eval_every eval_prompts eval_samples eval_share eval_lines heldout heldout_data",
    "run": "seed seeds save_every shown resume fork json",
}


def usage() -> str:
    lines = [f"  {name:9} {config.__doc__.splitlines()[0]}" for name, (config, _) in COMMANDS.items()]
    lines.append(f"  {'check':9} Look before a run of COMMAND: data, prompts, rewards, disk. Nothing is written.")
    more = "minirl COMMAND --help shows the options of one, minirl --version the version."
    return "usage: minirl [check] COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\n" + more


def check_usage() -> str:
    return (
        "usage: minirl check COMMAND [OPTIONS]\n\n"
        "Look before a run: read the data, render every prompt, complete and score one, compare the disk with what\n"
        f"the run writes. Nothing is written. COMMAND is one of {', '.join(CHECKS)};\n"
        "minirl COMMAND --help shows its options."
    )


def help_of(name: str, args: Sequence[str]) -> str:
    """Return the options of a command in groups, with the defaults that a preset or a run among `args` gives them."""
    kind, _ = COMMANDS[name]
    given, left = _defaults(kind, args), {f.name: f for f in fields(kind)}
    unnamed = [f.name for f in left.values() if not f.kw_only]
    lines = [f"usage: minirl {name} [OPTIONS]", "", kind.__doc__]
    for title, names in GROUPS.items():
        if shown := [left.pop(name) for name in (*unnamed, *names.split()) if name in left]:
            lines += ["", f"{title}:", *(line for f in shown for line in _described(kind, f, given))]
    return "\n".join(lines)


def _described(kind: type, f: Field, given: object, prefix: str = "--") -> list[str]:
    """Return the lines of --help about a field of a config: flag, values, docstring, and its default in `given`."""
    flag = prefix + f.name.replace("_", "-")
    default = getattr(given, f.name, f.default if f.default_factory is MISSING else f.default_factory())
    if is_dataclass(f.type):
        return [line for inner in fields(f.type) for line in _described(f.type, inner, default, flag + ".")]
    shown = " ".join(map(str, default)) if isinstance(default, tuple | dict) else str(default)
    ending = "(required)" if default in (MISSING, tyro.MISSING) else f"(default:\xa0{shown.strip() or repr(default)})"
    head = f"  {flag}, --no-{flag[2:]}" if f.type is bool else f"  {flag} {_values(f.type)}"
    width = min(max(shutil.get_terminal_size((120, 0)).columns, 60), 120)
    text = textwrap.TextWrapper(width, f"{head:<28}  ", " " * 30, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\xa0", " ") for line in text.wrap(f"{_docstrings(kind)[f.name]} {ending}")]


def _values(kind: object) -> str:
    """Name the values of a type: INT, FLOAT, STR or the choices."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is dict:
        return "NAME VALUE"
    if outer is Literal:
        return f"{{{','.join(inner)}}}"
    if outer is Annotated or outer is tuple:
        return _values(inner[0]) + (" ..." if outer is tuple else "")
    return "|".join(map(_values, inner)) if inner else "None" if kind is type(None) else kind.__name__.upper()


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Read the docstring of every field from the source; a class's own comes before those of the classes above it."""
    found = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        for field, text in pairwise(ast.parse(inspect.getsource(base)).body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def parse(name: str, args: Sequence[str]):
    """Make the config of a command from its arguments; an InputError names what does not fit."""
    kind, _ = COMMANDS[name]
    args, variables = _template_variables(args) if "template" in _options(kind, "") else (args, {})
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                kind, prog=f"minirl {name}", args=list(args), default=_defaults(kind, args), return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _first_sentence(complaint.getvalue()).removeprefix("value error: ")
        ours = re.match(r"Error parsing \w+: (.*)", text)  # from a config's __post_init__
        raise InputError(ours[1] if ours else f"{text}: see minirl {name} --help") from None
    if unknown:
        hint = _did_you_mean(unknown[0], _options(kind))
        raise InputError(f"minirl {name} has no option {unknown[0]!r}{hint}: see minirl {name} --help")
    return replace(config, template={**config.template, **variables}) if variables else config


def _template_variables(args: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """Split off the arguments of the form --template.NAME VALUE; return the others, and the variables."""
    rest, variables, waiting = [], {}, list(args)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag == "--template":
            raise InputError("--template has no name: write it as --template.NAME VALUE")
        if not flag.startswith("--template."):
            rest.append(flag + equals + value)
            continue
        if not equals and not waiting:
            raise InputError(f"{flag} has no value: write it as {flag} VALUE")
        variables[flag.removeprefix("--template.").replace("-", "_")] = _typed(value if equals else waiting.pop(0))
    return rest, variables


def _typed(text: str) -> object:
    """Read a value as JSON, else as a text; yes, no, on and off are booleans too, in any case of letters."""
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _did_you_mean(word: str, options: Sequence[str]) -> str:
    """Suggest the nearest option. Dashes are left out: they would make any two short options alike."""
    flag = word.partition("=")[0].lstrip("-").replace("_", "-")
    return did_you_mean(flag, [option.removeprefix("--") for option in options]).replace("mean '", "mean '--")


def _options(kind: type, prefix: str = "--") -> list[str]:
    names = []
    for f in fields(kind):
        flag = prefix + f.name.replace("_", "-")
        names += _options(f.type, flag + ".") if is_dataclass(f.type) else [flag]
    return names


def _first_sentence(box: str) -> str:
    """Return tyro's complaint on one line; it comes as a box with a title, drawn in ASCII where stdout is."""
    lines = [line.strip(" │") for line in box.splitlines()]
    title = lines[0].strip("╭─╮ ") if lines else "bad arguments"
    content = []
    for line in lines[1:]:
        if not re.fullmatch(r"[-─╰╯ ]*", line):
            content.append(line)
        elif content:
            break
    text = " ".join(content) or title
    return f"{title.lower()}: {text.removesuffix('.')}" if title.lower() not in text.lower() else text.removesuffix(".")


def _defaults(kind: type, args: Sequence[str]):
    """Return a config with the options of the run that is resumed, or of the preset; None without either."""
    names = [f.name for f in fields(kind)]
    if any(arg.partition("=")[0] == "--resume" for arg in args) and "resume" in names:
        out = Path(_value(args, "--out") or kind.out)
        return _from_json(kind, read_run_config(out), str(out))
    presets = {kind: partial(preset_defaults, critic=kind is PPOConfig) for kind in (GRPOConfig, PPOConfig)}
    preset = _value(args, "--preset") if kind in presets else None
    if preset and preset.lower() != "none":
        given = {name: _value(args, "--" + name.replace("_", "-")) for name in ("max_tokens", "prompts")}
        sizes = {name: int(value) for name, value in given.items() if value and value.isdigit()}
        return kind(model=tyro.MISSING, **presets[kind](preset, **sizes))
    return None


def _value(args: Sequence[str], flag: str) -> str | None:
    """Return the last value of a flag, given with dashes or underscores, as `--flag value` or `--flag=value`."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else args[i + 1] if i + 1 < len(args) else None
    return found


def _from_json(kind: type, content: dict, out: str):
    """Make a config from the content of config.json in a run's folder."""
    known = {f.name: f for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name in ("data_hash", "date", "format", "forks"):  # no options
            continue
        if name not in known:
            raise InputError(
                f"{out}/config.json: the key {name!r} is not one of this command's: was this another command's run?"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[name], known[name].type):
            raise InputError(f"{out}/config.json: {name!r} is {kind_of(value)}, which no {name} is: restore it")
    try:
        for name in values:
            if is_dataclass(known[name].type):
                values[name] = known[name].type(**values[name])
        return kind(**values, out=out)
    except TypeError as error:
        raise InputError(f"{out}/config.json is not as this command wrote it ({error}): restore it") from None


def _fits(value: object, kind: object) -> bool:
    """Tell whether a value from a file may stand in a field of this type."""
    outer, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):  # a name that it does not know is refused when it is made
        known = {f.name: f.type for f in fields(kind)}
        return isinstance(value, dict) and all(_fits(x, known[name]) for name, x in value.items() if name in known)
    if outer in (tuple, dict):
        parts = value if outer is tuple else (value.values() if isinstance(value, dict) else ())
        return isinstance(value, outer) and all(_fits(part, inner[0 if outer is tuple else 1]) for part in parts)
    if outer is Literal:
        return isinstance(value, str)  # `Config` knows which
    if outer is Annotated:
        return _fits(value, inner[0])
    if inner:
        return any(_fits(value, part) for part in inner)
    return type(value) is kind or (kind is float and is_number(value))


def main(argv: Sequence[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a completion may hold what the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            _dispatch(args)
        finally:
            sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))  # what a run has saved
        if is_out_of_memory(error):
            _fail(_out_of_memory(next(arg for arg in args if arg != "check")) + notes)
        if isinstance(error, RuntimeError):
            said = next(filter(GPU.search, str(error).splitlines()), "")
            if not said and not isinstance(error, getattr(torch, "AcceleratorError", ())):
                raise
            said = said or (str(error) or type(error).__name__).splitlines()[0]
            _fail(f"the GPU failed ({said}): look at its driver and memory{notes}")
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.exit(1)
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
        _fail(f"the system refused ({what}): check path, permissions and free space{notes}")
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return
    checked = args[0] == "check"
    args = args[1:] if checked else args
    if checked and args and args[0] in ("-h", "--help"):
        print(check_usage())
        return
    if checked and not args:
        raise InputError(f"minirl check needs a command to look at: minirl check COMMAND, one of {', '.join(CHECKS)}")
    if checked and args[0] not in CHECKS:
        known = args[0] in COMMANDS
        what = "does not look at" if known else "knows no command"
        hint = "" if known else did_you_mean(args[0], list(CHECKS))
        raise InputError(f"minirl check {what} {args[0]!r}{hint}: choose from {', '.join(CHECKS)}")
    if args[0] not in COMMANDS:
        names = [*COMMANDS, "check"]
        raise InputError(
            f"minirl has no command {args[0]!r}{did_you_mean(args[0], names)}: choose from {', '.join(names)}"
        )
    if {"-h", "--help"} & set(args):
        print(help_of(args[0], args[1:]))
        return
    config = parse(args[0], args[1:])
    try:
        (CHECKS[args[0]] if checked else COMMANDS[args[0]][1])(config)
    except NoChatTemplate as error:
        if not hasattr(config, "task") or getattr(config, "data", None):
            raise
        raise InputError(_without_template(config.task)) from error


def _without_template(task: str) -> str:
    """Say what helps on a command line; the tokenizer's own sentence speaks to programmers."""
    name, _, options = task.partition(":")
    if name not in TASKS:
        return f"the model has no chat template, which messages in {name} need: write its prompts as texts, style=plain"
    kept = [option for option in options.split(",") if option and not option.startswith("style=")]
    plain = f"--task {name}:{','.join([*kept, 'style=plain'])}"
    return f"the model has no chat template, which the prompts of task {name!r} need: give {plain}"


def _reader_left() -> bool:
    """Tell whether nobody reads stdout any more, as behind `| head`; if so, send to nowhere what is still written."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    if left := bool(waiting.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _out_of_memory(command: str) -> str:
    options = _options(COMMANDS[command][0])
    lower = " or ".join(flag for flag in ("--slots", "--micro-batch-tokens") if flag in options)
    recompute = ", or give --recompute (a run goes on with --resume)" if "--recompute" in options else ""
    return f"out of memory: {f'lower {lower}{recompute}' if lower else 'free some'}"


def _fail(sentence: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"minirl: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
