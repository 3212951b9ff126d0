"""From the command line to a command: its options, its config, and one sentence where something is wrong.

Whatever a user can get wrong ends in one sentence on stderr and exit code 2; Ctrl-C saves and ends with 130.
"""

import contextlib
import errno
import io
import json
import os
import re
import select
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from minirl.check import CHECKS
from minirl.commands import COMMANDS
from minirl.errors import InputError, NoChatTemplate
from minirl.files import read_json
from minirl.rewards.registry import did_you_mean
from minirl.tasks import TASKS
from minirl.train import grpo, ppo
from minirl.train.run import refuse_format

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _name_the_template_values() -> None:
    """`--template` stands in --help with a name and a value, not with all types that a value may have."""
    for base in {base for kind, _ in COMMANDS.values() for base in kind.__mro__}:
        hints = vars(base).get("__annotations__", {})
        if known := hints.get("template"):
            hints["template"] = Annotated[known, tyro.conf.arg(metavar="NAME VALUE")]


_name_the_template_values()


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


def parse(name: str, args: Sequence[str]):
    """The config of a command from its arguments; an InputError names what does not fit."""
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
    """The arguments without those of the form --template.NAME VALUE, and these variables."""
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
    """What a value is in JSON; yes, no, on and off in any case of letters are booleans as true and false are; else a
    text."""
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def _did_you_mean(word: str, options: Sequence[str]) -> str:
    """Without the dashes, which would make any two short options alike."""
    flag = word.partition("=")[0].lstrip("-").replace("_", "-")
    return did_you_mean(flag, [option.removeprefix("--") for option in options]).replace("mean '", "mean '--")


def _options(kind: type, prefix: str = "--") -> list[str]:
    names = []
    for f in fields(kind):
        flag = prefix + f.name.replace("_", "-")
        names += _options(f.type, flag + ".") if is_dataclass(f.type) else [flag]
    return names


def _first_sentence(box: str) -> str:
    """tyro's complaint is a box with a title, drawn in ASCII where stdout is; its content, on one line."""
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
    """Defaults that depend on other options: those of a preset, and those of the run that is resumed."""
    names = [f.name for f in fields(kind)]
    if any(arg.partition("=")[0] == "--resume" for arg in args) and "resume" in names:
        out = Path(_value(args, "--out") or kind.out)
        if not (out / "config.json").exists():
            raise InputError(f"{out} holds no run to resume: check --out, or leave --resume away")
        content = read_json(out / "config.json")
        refuse_format(content, out)
        return _from_json(kind, content, str(out))
    presets = {grpo.GRPOConfig: grpo.preset_defaults, ppo.PPOConfig: ppo.preset_defaults}
    preset = _value(args, "--preset") if kind in presets else None
    if preset and preset.lower() != "none":
        given = {name: _value(args, "--" + name.replace("_", "-")) for name in ("max_tokens", "prompts")}
        sizes = {name: int(value) for name, value in given.items() if value and value.isdigit()}
        return kind(model=tyro.MISSING, **presets[kind](preset, **sizes))
    return None


def _value(args: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, with dashes or underscores, as `--flag value` or `--flag=value`."""
    found = None
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else args[i + 1] if i + 1 < len(args) else None
    return found


def _from_json(kind: type, content: dict, out: str):
    """A config dataclass from the run folder's config.json."""
    known = {f.name: f for f in fields(kind)}
    values = {}
    for name, value in content.items():
        if name in ("data_hash", "date", "format"):  # no options
            continue
        if name not in known:
            raise InputError(
                f"{out}/config.json: the key {name!r} is not one of this command's: was this another command's run?"
            )
        values[name] = tuple(value) if isinstance(value, list) else value
    try:
        for name in values:
            if is_dataclass(known[name].type):
                values[name] = known[name].type(**values[name])
        return kind(**values, out=out)
    except TypeError as error:
        raise InputError(f"{out}/config.json is not as this command wrote it ({error}): restore it") from None


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
        if _is_out_of_memory(error):
            _fail(_out_of_memory(next(arg for arg in args if arg != "check")))
        if not isinstance(error, OSError):
            raise
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.exit(1)
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
        _fail(f"the system refused ({what}): check path, permissions and free space; earlier checkpoints are intact")
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
    config = parse(args[0], args[1:])
    try:
        (CHECKS[args[0]] if checked else COMMANDS[args[0]][1])(config)
    except NoChatTemplate as error:
        if not hasattr(config, "task") or getattr(config, "data", None):
            raise
        raise InputError(_without_template(config.task)) from error


def _without_template(task: str) -> str:
    """What a person can do on a command line; the tokenizer's own sentence speaks to programmers."""
    name, _, options = task.partition(":")
    if name not in TASKS:
        return f"the model has no chat template, which messages in {name} need: write its prompts as texts, style=plain"
    kept = [option for option in options.split(",") if option and not option.startswith("style=")]
    plain = f"--task {name}:{','.join([*kept, 'style=plain'])}"
    return f"the model has no chat template, which the prompts of task {name!r} need: give {plain}"


def _reader_left() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`; then nothing more is written to it."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    if left := bool(waiting.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch has no class of its own for it, and other words on other systems."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    return known or any(text in str(error) for text in words)


def _out_of_memory(command: str) -> str:
    options = _options(COMMANDS[command][0])
    lower = " or ".join(flag for flag in ("--slots", "--micro-batch-tokens") if flag in options)
    recompute = ", or give --recompute (a run goes on with --resume)" if "--recompute" in options else ""
    return f"out of memory: {f'lower {lower}{recompute}' if lower else 'free some'}"


def _fail(sentence: str) -> None:
    print(f"minirl: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
