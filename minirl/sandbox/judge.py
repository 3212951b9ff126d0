"""Tests of a program that does not see them: the judge runs the tests in one process, the program runs in another.

The judge sends names and arguments, the program's process sends results back, as data (`encode`). So the program can
neither read the tests nor change how they compare, and an object that is equal to everything has no way to the judge.
"""

import ast
import builtins
import json
import os
import struct

MAX_MESSAGE = 16 * 2**20  # bytes
LARGE = 2**63  # integers from here on travel in hexadecimal: decimal takes quadratic time


class Failed(BaseException):
    """The program is wrong, whatever the tests would catch; the message says how."""


class ProgramError(Exception):
    """An exception that the program has raised, of a kind of its own."""


class CannotJudge(BaseException):
    """The tests are at fault, not the program."""


# --- values as JSON ---------------------------------------------------------------------------------------------------


def encode(value, refer):
    """Data as JSON, with its types (a tuple is no list); `refer(value)` is asked about anything else."""
    match value:
        case None | bool() | float() | str():
            return _plain(value)
        case int():
            return int(value) if -LARGE < value < LARGE else ["int", hex(value)]
        case complex():
            return ["complex", value.real, value.imag]
        case bytes() | bytearray():
            return [type(value).__name__, bytes(value).hex()]
        case range():
            return ["range", value.start, value.stop, value.step]
        case list() | tuple() | set() | frozenset():
            kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            return [kind.__name__, *(encode(item, refer) for item in kind.__iter__(value))]
        case dict():  # a Counter, too
            return ["dict", *([encode(k, refer), encode(v, refer)] for k, v in dict.items(value))]
    return refer(value)


def decode(message, resolve):
    """What `encode` has written; `resolve(kind, rest)` is asked about its references."""
    if not isinstance(message, list):
        return message
    kind, *rest = message
    match kind:
        case "int":
            return int(rest[0], 16)
        case "complex":
            return complex(*rest)
        case "bytes" | "bytearray":
            return getattr(builtins, kind).fromhex(rest[0])
        case "range":
            return range(*rest)
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(decode(item, resolve) for item in rest)
        case "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in rest}
    return resolve(kind, rest)


def _plain(value):
    """Of a subclass of float or str the value alone."""
    kind = next((k for k in (float, str) if isinstance(value, k)), None)
    return kind(value) if kind is float else str.__str__(value) if kind is str else value


class Channel:
    """Messages over two pipes."""

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = reading, writing

    def send(self, message) -> None:
        body = json.dumps(message).encode()
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a value of {len(body)} bytes")
        body = memoryview(struct.pack(">I", len(body)) + body)
        while body:
            body = body[os.write(self.writing, body) :]

    def receive(self):
        (size,) = struct.unpack(">I", self._exactly(4))
        if size > MAX_MESSAGE:
            raise Failed("the program sent too much")
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.reading, min(size, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


# --- the program's side -----------------------------------------------------------------------------------------------


def serve(program: str, channel: Channel) -> None:
    """Run the program, then answer the judge until it hangs up."""
    objects: list[object] = []  # what the judge holds references to

    def refer(value):
        objects.append(value)
        return ["ref", len(objects) - 1]

    def resolve(kind, rest):
        return objects[rest[0]] if kind == "ref" else scope[rest[0]]

    scope: dict[str, object] = {"__name__": "program"}
    try:
        exec(compile(program, "<program>", "exec"), scope)
        channel.send(["ready"])
    except BaseException as error:
        channel.send(["raised", type(error).__name__, _message(error)])
        return
    while True:
        request = channel.receive()
        try:
            action, target, *rest = (decode(part, resolve) for part in request)
            before = json.dumps(request[2]) if action == "call" else ""
            answer = ["value", encode(ACTIONS[action](target, *rest), refer)]
            if action == "call":
                after = encode(rest[0], refer)
                answer += [after] if json.dumps(after) != before else []
            channel.send(answer)
        except BaseException as error:
            channel.send(["raised", type(error).__name__, _message(error)])


ACTIONS = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "list": list,
    "len": len,
    "bool": bool,
    "name": lambda target: target,
}


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


# --- the judge's side -------------------------------------------------------------------------------------------------


class Remote:
    """A name or an object of the program. It is equal to itself alone."""

    def __init__(self, judge: "Judge", place: list):
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_place", place)

    def __call__(self, *args, **kwargs):
        return self._judge.ask("call", self, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.ask("get", self, name)

    def __setattr__(self, name: str, value) -> None:
        self._judge.ask("set", self, name, value)

    def __getitem__(self, key):
        return self._judge.ask("item", self, key)

    def __iter__(self):
        return iter(self._judge.ask("list", self))

    def __len__(self):
        return self._judge.ask("len", self)

    def __bool__(self):
        return self._judge.ask("bool", self)


class Judge:
    def __init__(self, channel: Channel):
        self.channel = channel

    def ask(self, action: str, target: Remote, *rest):
        """The program's answer; arguments that it has changed in place are changed here too."""
        request = [action, *(encode(part, self._refer) for part in (target, *rest))]
        try:
            self.channel.send(request)
            answer = self.channel.receive()
        except (EOFError, BrokenPipeError):
            raise Failed("the program ended before its tests") from None
        if answer[0] == "raised":
            raise _exception(*answer[1:])
        if len(answer) > 2:
            for argument, now in zip(rest[0], decode(answer[2], self._resolve), strict=True):
                _change(argument, now)
        return decode(answer[1], self._resolve)

    def _resolve(self, kind: str, rest: list) -> Remote:
        return Remote(self, [kind, *rest])

    @staticmethod
    def _refer(value):
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_place")
        raise CannotJudge(f"the tests pass a {type(value).__name__} to the program, which cannot be sent")

    def run(self, helpers: str, tests: str, entry: str) -> None:
        """Failed if the program does not pass. `helpers` is what the tests may call of their own, `entry` the program's
        function, which they also know as `candidate`; any other name that they do not define is the program's."""
        try:
            scope: dict[str, object] = {"__name__": "tests"}
            exec(compile(helpers, "<helpers>", "exec"), scope)
            tree = ast.parse(tests)
        except Exception as error:
            raise CannotJudge(f"the tests cannot be read ({type(error).__name__}: {error})") from error
        ready = self.channel.receive()
        if ready[0] == "raised":
            raise Failed(f"the program raised {ready[1]}: {ready[2]}")
        for name in _free_names(tree) - scope.keys() - vars(builtins).keys():
            scope[name] = Remote(self, ["name", name])
        if entry:
            scope[entry] = scope["candidate"] = Remote(self, ["name", entry])
        exec(compile(tree, "<tests>", "exec"), scope)
        self.ask("name", Remote(self, ["name", "__name__"]))  # a program that has ended has not passed


def verdict(channel: Channel, helpers: str, tests: str, entry: str) -> dict:
    """{"passed": whether, "why": what went wrong}; with "unjudged" for tests that are themselves at fault."""
    try:
        Judge(channel).run(helpers, tests, entry)
    except CannotJudge as error:
        return {"passed": False, "why": str(error), "unjudged": True}
    except EOFError:
        return {"passed": False, "why": "the program ended before its tests"}
    except Failed as error:
        return {"passed": False, "why": str(error)}
    except BaseException as error:
        return {"passed": False, "why": f"{type(error).__name__}: {_message(error)}".removesuffix(": ")}
    return {"passed": True, "why": ""}


def _free_names(tree: ast.AST) -> set[str]:
    """Names that are read and neither assigned, defined nor imported."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return {node.id for node in names} - bound


def _exception(kind: str, message: str) -> Exception:
    """The program's exception as one of Python's own where it is one, as tests may expect it."""
    found = getattr(builtins, kind, None)
    if (
        isinstance(found, type) and issubclass(found, Exception) and not kind.startswith("Stop")
    ):  # map takes it for an end
        try:
            return found(message)
        except Exception:  # some want other arguments
            pass
    return ProgramError(f"{kind}: {message}")


def _change(argument, now) -> None:
    if isinstance(argument, list | bytearray) and argument != now:
        argument[:] = now
    elif isinstance(argument, dict | set) and argument != now:
        argument.clear()
        argument.update(now)
