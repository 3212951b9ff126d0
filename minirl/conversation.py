"""Chat messages and tools as data sets write them, made into the one form that chat templates read.

    {"role", "content", ...}    content: a text, or a list of parts {"type": "text", "text"}
    {"from", "value"}           ShareGPT: human, gpt, system, tool, function_call, observation

Of a message all other keys stay (tool_calls, name, reasoning_content): templates read them. A key that is null is left
out, as templates ask whether a key is there. A template skips a role that it does not know without a word, so only
known ones are taken, in any case of letters.
"""

from minirl.errors import InputError
from minirl.files import kind_of, parse_json

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def prompt_of(value: object, where: str, name: str = "prompt") -> str | list[dict]:
    """Return a text as it is, or messages; InputError for anything else."""
    return value if isinstance(value, str) else messages_of(value, where, name)


def messages_of(value: object, where: str, name: str = "messages") -> list[dict]:
    """Read the messages of a list, or of a single message."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise InputError(f"{where}: {name!r} is the text of a list: write the list itself, without quotes around it.")
    if not isinstance(value, list):
        raise InputError(f"{where}: {name!r} is {kind_of(value)}, but must be a text or a list of chat messages.")
    if not value:
        raise InputError(f"{where}: {name!r} is an empty list: it needs at least one chat message.")
    messages: list[dict] = []
    for i, entry in enumerate(value):
        message = _message(entry, f"{where}: message {i} of {name!r}")
        if (
            _calls_alone(entry)
            and messages
            and messages[-1]["role"] == "assistant"
            and "tool_calls" not in messages[-1]
        ):
            message = {**messages.pop(), "tool_calls": message["tool_calls"]}  # its words, then its call: one turn
        messages.append(message)
    return messages


def _calls_alone(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("from") == "function_call"


def _message(value: object, what: str) -> dict:
    if isinstance(value, dict) and "from" in value and "role" not in value:
        value = _of_sharegpt(value, what)
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise InputError(f"{what} needs a 'role' and a 'content', both texts.")
    rest = {key: x for key, x in value.items() if x is not None and key not in ("role", "content")}
    if calls := rest.pop("tool_calls", None):
        rest["tool_calls"] = _calls(calls, what)
    content = value.get("content")
    content = None if content is None and calls else _text(content, what)  # templates may tell null from empty
    return {"role": _role(value["role"], what), "content": content, **rest}


def _role(name: object, what: str) -> str:
    known = str(name).strip().lower()
    role = ROLES.get(known, known)
    if role not in KNOWN_ROLES:
        raise InputError(f"{what} is from {name!r}: it must be one of {', '.join((*ROLES, *KNOWN_ROLES))}.")
    return role


def _text(content: object, what: str) -> str:
    """Read the text of a content; parts are joined as they stand, without a character between them."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise InputError(f"{what} has a part of type {part['type']!r}: only parts of type 'text' can be read.")
        texts.append(part.get("text", part.get("value")) if isinstance(part, dict) and part is not content else part)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} needs a 'role' and a 'content', both texts.")
    return "".join(texts)


def _of_sharegpt(value: dict, what: str) -> dict:
    role, text = _role(value["from"], what), value.get("value")
    if value["from"] != "function_call":
        return {"role": role, "content": text}
    calls = _parsed(text, f"{what}, a function_call")
    return {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _calls(calls: object, what: str) -> list[dict]:
    """Read tool calls as {"type": "function", "function": {"name", "arguments"}}; arguments that are the text of a JSON
    object become that object, else a template would escape them a second time."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{what} has a tool call without a function's 'name': give 'name' and 'arguments'.")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = _parsed(arguments, f"{what}, the arguments of {function['name']}")
        outer = {key: x for key, x in call.items() if x is not None} if "function" in call else {"type": "function"}
        found.append({**outer, "function": {**function, "arguments": {} if arguments is None else arguments}})
    return found


def tools_of(row: dict, where: str) -> list[dict] | None:
    """Read the column 'tools', a list of functions or the text of one; each becomes {"type": "function", "function":
    {...}}; None where there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: 'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: 'tools' must be a list of functions, or the text of such a list in JSON.")
    return [tool if "function" in tool or "name" not in tool else _tool(tool) for tool in tools]


def _tool(function: dict) -> dict:
    return {"type": "function", "function": {key: x for key, x in function.items() if key != "type"}}


def with_system(prompt: str | list[dict], row: dict, where: str) -> str | list[dict]:
    """Return the prompt with the text of the column 'system' or 'system_prompt' as its first message; without one, as
    it is."""
    system = row.get("system") or row.get("system_prompt")
    if not system:
        return prompt
    if not isinstance(system, str):
        raise InputError(f"{where}: 'system' is {kind_of(system)}, but must be a text.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    own = next((message["content"] for message in messages[:1] if message["role"] == "system"), None)
    if own is not None and own != system:
        raise InputError(f"{where}: 'system' and the first message are two system texts: keep one of them.")
    return messages if own is not None else [{"role": "system", "content": system}, *messages]


def _parsed(text: object, what: str) -> object:
    if not isinstance(text, str):
        raise InputError(f"{what} is {kind_of(text)} where the text of JSON is needed: correct it.")
    return parse_json(text, what, "correct it.")
