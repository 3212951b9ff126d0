"""Render chat templates: the Jinja programs in a tokenizer's configuration that turn messages into text.

jinja2 is optional, so this file is imported only when a template is rendered. A template comes with a downloaded model,
so it is foreign code: it runs in Jinja's immutable sandbox and gets only JSON values, never an object with methods of
its own. The environment is that of transformers (block trimming, loop controls, `tojson` without HTML
escapes, `raise_exception`, `strftime_now`, `{% generation %}`), because a template that renders differently here than
where the model was trained is a silent loss of quality.

A template that calls `strftime_now` writes a date into the prompt: the tokenizer's `now`, which a run keeps.

Time and memory of a render are bounded (metered.py).
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version

from minirl.errors import InputError

OLDEST_SAFE_JINJA = (3, 1, 6)  # earlier sandboxes have published escapes (CVE-2024-56326, CVE-2025-27516)
OURS = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}  # set by minirl, not by a user
INSTALL = "run pip install 'minirl[cli]'"
LONGEST = 100_000  # characters of a template; the longest of known models have 20,000

try:
    import jinja2
    import jinja2.ext
    import jinja2.meta

    from minirl.metered import Environment, Meter, TooMuch
except ImportError as error:
    raise InputError(f"chat templates need jinja2, which is not installed: {INSTALL}") from error

if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < OLDEST_SAFE_JINJA:
    raise InputError(f"jinja2 {version('jinja2')} has a sandbox that templates can escape: {INSTALL}")


def render_chat(template: str, messages: list[dict], moment: datetime, **variables) -> str:
    """Return the text of a conversation at a moment; `variables` are special tokens and other values that the template
    reads. InputError where it cannot render the messages.

    Some templates want the arguments of tool calls as JSON text, or an empty text where the content beside them is
    null. Where the template fails on the messages as they are, or prints the null as "None", those spellings are
    tried."""
    first, *others = _spellings(messages)  # without tool calls there are no others
    try:
        text = _render(template, first, moment, variables)
    except InputError:
        for spelling in others:
            with contextlib.suppress(InputError):
                return _render(template, spelling, moment, variables)
        raise
    if "None" in text and others and any(message.get("content", "") is None for message in messages):
        with contextlib.suppress(InputError):
            spelled = _render(template, others[0], moment, variables)
            return spelled if spelled.count("None") < text.count("None") else text
    return text


def _spellings(messages: list[dict]) -> list[list[dict]]:
    """Return the messages as they are, with empty contents in place of null ones, with the arguments of their tool
    calls as JSON text, and with both."""
    if not any(isinstance(message, Mapping) and message.get("tool_calls") for message in messages):
        return [messages]
    filled = [{**message, "content": message.get("content") or ""} for message in messages]
    return [messages, filled, _with_text_arguments(messages), _with_text_arguments(filled)]


def _with_text_arguments(messages: list[dict]) -> list[dict]:
    def spelled(call: dict) -> dict:
        function = call.get("function", call)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}

    return [
        m | {"tool_calls": [spelled(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages
    ]


def _render(template: str, messages: list[dict], moment: datetime, variables: dict) -> str:
    try:
        # Through JSON and back: no object with methods of its own reaches the template.
        text = json.dumps({"tools": None, "documents": None, **variables, "messages": messages})
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the messages hold something that is not plain JSON ({error}): pass text") from error
    compiled = compile_template(template)

    def strftime_now(format):
        if len(format) > 1000:
            raise TooMuch("a format of a date of more than 1000 characters")
        return moment.strftime(format)

    try:
        context = compiled.new_context({**values, "strftime_now": strftime_now})
        context.meter = Meter(len(text))
        return "".join(compiled.root_render_func(context))
    except TooMuch as error:
        raise InputError(f"the chat template asks for {error}: use another template") from None
    except jinja2.exceptions.SecurityError as error:
        raise InputError(f"the chat template reaches for Python's internals ({error}): use another template") from error
    except Exception as error:
        if what := _not_given(error):
            raise InputError(f"the chat template asks for {what}: use another template") from None
        if type(error) is jinja2.TemplateError:  # the template's own raise_exception
            raise InputError(f"the chat template refuses these messages: {error!s:.500}") from error
        reason = f"{type(error).__name__}: {error!s:.500}"
        raise InputError(f"the chat template cannot render these messages ({reason}): change one of the two") from error


def _not_given(error: Exception) -> str | None:
    """Say which filter or test a template asks for that it is not given, where that is the error."""
    found = re.match(r"No (filter|test) named (.{1,100}?)( found)?\.", str(error))
    return found and f"the {found[1]} {found[2]}, which is not among those that minirl gives templates"


def refuse_unread(template: str, variables: Iterable[str]) -> None:
    """Raise an InputError for a variable that a template does not read from outside, or that a user must not set."""
    compile_template(template)  # raises the sentence for a template that is no valid Jinja
    read = jinja2.meta.find_undeclared_variables(_environment().parse(template)) - OURS
    for name in variables:
        if name not in read:
            raise InputError(
                f"the chat template reads no variable {name!r}: choose from {', '.join(sorted(read)) or 'none'}"
            )


@lru_cache(maxsize=16)  # compiling takes longer than rendering, and a run has one template
def compile_template(template: str) -> jinja2.Template:
    """Compile a template once; InputError names the line where it is no valid Jinja."""
    if len(template) > LONGEST:
        raise InputError(f"the chat template has {len(template):,} characters, and {LONGEST:,} at most are read")
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        if what := _not_given(error):
            raise InputError(f"the chat template asks for {what}, line {error.lineno}: use another template") from None
        reason = f"{error.message}, line {error.lineno}"
    except TooMuch as error:
        reason = f"it asks for {error}"
    except SyntaxError as error:  # of the Python code that Jinja makes of it
        reason = error.msg
    except (RecursionError, MemoryError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: it is nested too deeply, or holds a number that is too large"
    raise InputError(f"the chat template is not valid Jinja ({reason:.500}): fix it in tokenizer_config.json")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    extensions = [_GenerationTag, jinja2.ext.loopcontrols]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, with which some templates mark the assistant's words; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message):
    raise jinja2.TemplateError(message)
