"""Chat templates are foreign code: hostile ones end soon, small and in one sentence; honest ones render as ever."""

import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minirl import chat, metered
from minirl.chat import render_chat
from minirl.errors import InputError

HERE = Path(__file__).parent
HOSTILE = tomllib.loads((HERE / "hostile_templates.toml").read_text(encoding="utf-8"))
PUBLIC = tomllib.loads((HERE / "public_templates.toml").read_text(encoding="utf-8"))
SAME = PUBLIC.pop("same")
NOW = datetime(2026, 1, 2)
SECONDS, MEGABYTES = 5, 512  # of a render that may cost metered.UNITS
PART = 8  # renders here may cost but one part of so many: the tests are quick, and tell as much
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 3 + 4? <b>Größe</b> 你好"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSeven."},
    {"role": "user", "content": "Say '7'.\n"},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", 1]}}},
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add\ntwo", "parameters": SCHEMA}}]
CALL = {"id": "abc", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": ["x"]}}}
USED = [
    *TALK,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "[1, 2]"},
    {"role": "assistant", "content": "Done."},
    {"role": "user", "content": "Good."},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def spelled_out(template: str) -> str:
    return re.sub(r"⟦(\d+)\|(.*?)⟧", lambda found: found[2] * int(found[1]), template)


def outcomes_of(templates: list[str]) -> list[dict]:
    """Render templates in a child process of this one, under limits; those after one at which it dies in another."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with os.fdopen(writing, "w") as file:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for template in templates:
                signal.alarm(4 * SECONDS)
                start = time.thread_time()
                try:
                    said = ["rendered", render_chat(template, TALK, NOW, **VARIABLES)[:2000]]
                except InputError as error:
                    said = ["refused", str(error)]
                except BaseException as error:
                    said = ["traceback", repr(error)[:2000]]
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
                print(json.dumps({"said": said, "seconds": time.thread_time() - start, "grown": grown}), file=file)
                file.flush()
                gc.collect(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        found = [json.loads(line) for line in file]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if len(found) < len(templates):
        found += [{"said": ["died", str(code)], "seconds": 0, "grown": 0}]
        return found + (outcomes_of(templates[len(found) :]) if len(found) < len(templates) else [])
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """What becomes of each hostile template, rendered in a process of its own that has imported little."""
    folder = tmp_path_factory.mktemp("hostile")
    done = subprocess.run([sys.executable, __file__], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []  # nothing was run
    return json.loads(done.stdout)


def test_there_are_many():
    assert sum(map(len, HOSTILE.values())) >= 100


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, cases in HOSTILE.items() for name in cases])
def test_a_hostile_template_is_refused_or_small(group, name, outcomes):
    found = outcomes[group][name]
    how, said = found["said"]
    assert how == "refused" or (group == "code" and how == "rendered"), said
    assert found["seconds"] < SECONDS / 2 and found["grown"] < MEGABYTES / PART, found  # compiling takes its time
    if how == "refused":
        assert said.startswith("the chat template ") and len(said) < 900
    else:
        assert not re.search("class|object at|function|environment|touch", said), said


def plain_text(template: str, messages: list[dict], **variables) -> str:
    """Render as transformers does, without any bound."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[chat._GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = chat._raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(template).render(messages=messages, documents=None, **variables)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("messages", [TALK, TALK[1:], USED])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_styles_of_published_models_render_the_very_same_text(name, messages, tools):
    wanted = plain_text(PUBLIC[name], messages, tools=tools, **VARIABLES)
    assert render_chat(PUBLIC[name], messages, NOW, tools=tools, **VARIABLES) == wanted
    assert wanted.count("Seven.") == 1


@pytest.mark.parametrize("name", PUBLIC)
def test_a_long_conversation_is_within_the_bounds(name, monkeypatch):
    """Of 5,000 messages, and of one of five million letters, each divided by PART as the bound is."""
    monkeypatch.setattr(metered, "UNITS", metered.UNITS // PART)
    turns = [TALK[0], *(TALK[1:3] * (2500 // PART - 1)), TALK[1]]
    assert render_chat(PUBLIC[name], turns, NOW, **VARIABLES).count("Größe") == 2500 // PART
    wide = [{"role": "user", "content": "你" * (5_000_000 // PART)}]
    assert render_chat(PUBLIC[name], wide, NOW, **VARIABLES).count("你") == 5_000_000 // PART


@pytest.mark.parametrize("template", SAME)
def test_bounds_change_no_text(template):
    assert render_chat(template, TALK, NOW) == plain_text(template, TALK)


def test_a_render_has_its_own_bounds():
    """Several renders together may cost more than one may."""
    for _ in range(8):
        assert len(render_chat("{{ 'a' * 15000000 }}", TALK, NOW)) == 15_000_000


if __name__ == "__main__":
    metered.UNITS //= PART
    print(
        json.dumps(
            {g: dict(zip(t, outcomes_of([*map(spelled_out, t.values())]), strict=True)) for g, t in HOSTILE.items()}
        )
    )
