"""Chat templates: the Jinja program in a tokenizer's configuration that turns messages into text.

An optional adapter, imported only when a template is rendered. A template comes with a downloaded model, so it is
somebody else's code: it runs in Jinja's immutable sandbox, and it sees plain JSON values alone, never an object with
methods of its own. The environment is that of transformers (block trimming, loop controls, `tojson` without HTML
escapes, `raise_exception`, `strftime_now`, `{% generation %}`), because a template that renders differently here than
where the model was trained is a silent loss of quality.

A template that calls `strftime_now` writes today's date into the prompt; where a run has to repeat exactly, pass the
date as a variable.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version

from minirl.errors import InputError

OLDEST_SAFE_JINJA = (3, 1, 6)  # earlier sandboxes have published escapes (CVE-2024-56326, CVE-2025-27516)
INSTALL = "run pip install 'minirl[cli]'"

try:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError as error:
    raise InputError(f"chat templates need jinja2, which is not installed: {INSTALL}") from error

if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < OLDEST_SAFE_JINJA:
    raise InputError(f"jinja2 {version('jinja2')} has a sandbox that templates can escape: {INSTALL}")


def render_chat(template: str, messages: list[dict], **variables) -> str:
    """The text of a conversation; `variables` are special tokens and whatever else the template reads."""
    check_messages(messages)
    try:
        plain = json.loads(json.dumps({"tools": None, "documents": None, **variables, "messages": messages}))
    except (TypeError, ValueError) as error:
        raise InputError(f"the messages hold something that is not plain JSON ({error}): pass text") from error
    compiled = compile_template(template)
    try:
        return compiled.render(plain)
    except jinja2.exceptions.SecurityError as error:
        raise InputError(f"the chat template reaches for Python's internals ({error}): use another template") from error
    except Exception as error:
        if type(error) is jinja2.TemplateError:  # the template's own raise_exception
            raise InputError(f"the chat template refuses these messages: {error}") from error
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"the chat template cannot render these messages ({reason}): change one of the two") from error


def check_messages(messages: list[dict]) -> None:
    """Templates read missing keys as empty text, so a misspelt one would vanish without a word."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"a chat prompt must be a list of messages with 'role' and 'content', not {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index} must be a mapping with a text 'role', not {message!r:.80}")
        content = message.get("content")
        said_otherwise = content is None and message.get("tool_calls")
        if not isinstance(content, str | list) and not said_otherwise:
            raise InputError(f"message {index} must have a text 'content', not {message!r:.80}")


@lru_cache(maxsize=16)
def compile_template(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        reason = f"{error.message}, line {error.lineno}"
        raise InputError(f"the chat template is not valid Jinja ({reason}): fix it in tokenizer_config.json") from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [_GenerationTag, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's own words for trainers that mask by text; the text stays the same."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format):
    return datetime.now().strftime(format)
