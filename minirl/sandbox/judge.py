"""Tests of a program that does not see them: the judge runs the tests in one process, the program runs in another.

The judge sends names and arguments, the program's process sends results back, as data (`encode`). So the program can
neither read the tests nor change how they compare, and an object that is equal to everything has no way to the judge.
"""

import ast
import builtins
import json
import operator
import sys
import types
from collections import deque

from minirl.sandbox.messages import Channel, decode, encode

MAX_ARGUMENTS = 10_000  # characters of what an exception holds


class Failed(BaseException):
    """The program is wrong, whatever the tests would catch; the message says how."""


class ProgramError(Exception):
    """An exception that the program has raised, of a kind of its own."""


class CannotJudge(BaseException):
    """The tests are at fault, not the program."""


# --- the program's side -----------------------------------------------------------------------------------------------


def serve(program: str, channel: Channel) -> None:
    """Run the program, then answer the judge until it hangs up."""
    objects: list[object] = []  # what the judge holds references to

    def refer(value):
        objects.append(value)
        return ["ref", len(objects) - 1]

    def resolve(kind, rest):
        return objects[rest[0]] if kind == "ref" else scope[rest[0]]

    module = sys.modules["program"] = types.ModuleType("program")  # where dataclasses and pickle look for its classes
    scope = vars(module)
    try:
        exec(compile(program, "<program>", "exec"), scope)
        channel.send(["ready"])
    except BaseException as error:
        channel.send(_raised(error))
        return
    while True:
        request = channel.receive()
        try:
            action, target, *rest = (decode(part, resolve) for part in request)
            answer = ["value", encode(ACTIONS[action](target, *rest), refer)]
            if action == "call":
                after = [encode(part, refer) for part in rest]
                answer += after if json.dumps(after) != json.dumps(request[2:]) else []
            channel.send(answer)
        except BaseException as error:
            channel.send(_raised(error))


OPERATORS = (
    *("neg", "pos", "abs", "invert", "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("lshift", "rshift", "and_", "or_", "xor"),
)
ACTIONS = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "list": list,
    "len": len,
    "bool": bool,
    "name": lambda target: target,
    "str": str,
    "next": next,
    **{name: getattr(operator, name) for name in OPERATORS},
}


def _raised(error: BaseException) -> list:
    """The names of its class and those above it, its text, and what it holds, if that is data."""
    kinds, text = [kind.__name__ for kind in type(error).__mro__], _message(error)
    try:
        holds = [encode(argument, None) for argument in error.args]
        if len(json.dumps(holds)) > MAX_ARGUMENTS:
            holds = [text]
    except BaseException:
        holds = [text]
    return ["raised", kinds, text, holds]


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


# --- the judge's side -------------------------------------------------------------------------------------------------


class Remote:
    """A name or an object of the program. It is equal to itself alone, and has no order: the program's word on that
    would be the verdict on `f(2) == C(2)`, as C, too, is on its side, and may be equal to everything there."""

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

    def __str__(self):
        return self._judge.ask("str", self)

    def __next__(self):
        try:
            return self._judge.ask("next", self)
        except Exception as error:
            if type(error).__name__ == "StopIteration":
                raise StopIteration(*error.args) from None
            raise


def _operator(name: str):
    """Between two objects of the program alone. With data beside it the program would see what the tests expect of it
    and have the last word: `abs(f(2) - 4) < 1e-6` would pass for an object whose difference to everything is 0."""

    def apply(self, *other):
        if not all(isinstance(value, Remote) for value in other):
            return NotImplemented
        return self._judge.ask(name, self, *other)

    return apply


for _name in OPERATORS:
    setattr(Remote, f"__{_name.rstrip('_')}__", _operator(_name))


class Judge:
    def __init__(self, channel: Channel):
        self.channel = channel

    def ask(self, action: str, target: Remote, *rest):
        """The program's answer; arguments that it has changed in place are changed here too."""
        request = [action, *(encode(part, self._refer) for part in (target, *rest))]
        try:
            self.channel.send(request)
        except BrokenPipeError:
            raise Failed("the program ended before its tests") from None
        try:
            answer = self.channel.receive()
            if answer[0] == "raised":
                result = _exception(*answer[1:])
            else:
                result, *after = (decode(part, self._resolve) for part in answer[1:])
                if after:
                    given, changed = ([*args, *kwargs.values()] for args, kwargs in (rest, after))
                    for argument, now in zip(given, changed, strict=True):
                        _change(argument, now)
        except EOFError:
            raise Failed("the program ended before its tests") from None
        except Exception as error:
            raise Failed(f"the program's answer is no message ({type(error).__name__}: {_message(error)})") from error
        if isinstance(result, Exception):
            raise result
        return result

    def _resolve(self, kind: str, rest: list) -> Remote:
        if kind != "ref":
            raise ValueError(f"a {kind}")
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
            scope["__builtins__"] = vars(builtins) | {"__import__": _import}
            exec(compile(helpers, "<helpers>", "exec"), scope)
            tree = ast.parse(tests)
        except Exception as error:
            raise CannotJudge(f"the tests cannot be read ({type(error).__name__}: {error})") from error
        ready = self.channel.receive()
        if ready[0] == "raised":
            raise Failed(f"the program raised {ready[1][0]}: {ready[2]}")
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
        why = f"{type(error).__name__}: {_message(error)}".removesuffix(": ")
        if getattr(error, "of_the_tests", False):
            why = f"the tests import what the sandbox does not have ({why}): only Python's standard library is there"
            return {"passed": False, "why": why, "unjudged": True}
        return {"passed": False, "why": why}
    return {"passed": True, "why": ""}


def _import(*arguments):
    """`import` in the tests, which may catch its error."""
    try:
        return builtins.__import__(*arguments)
    except (ImportError, OSError) as error:
        error.of_the_tests = True
        raise


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


def _exception(kinds: list[str], text: str, holds: list) -> Exception:
    """The program's exception: its class by name, on top of the first of its classes that is Python's own, as tests may
    expect that. Not StopIteration: map takes it for an end, which only `next` may tell."""
    above = (getattr(builtins, str(kind), None) for kind in kinds if not str(kind).startswith("Stop"))
    above = [kind for kind in above if isinstance(kind, type) and issubclass(kind, Exception)]
    for base in above[: len(kinds)]:
        kind = base if base.__name__ == kinds[0] else type(str(kinds[0]), (base,), {})
        for arguments in (holds, [text]):
            try:
                return kind(*(decode(argument, None) for argument in arguments))
            except Exception:  # some want other arguments
                pass
    return ProgramError(f"{kinds[0]}: {text}")


def _change(argument, now) -> None:
    if isinstance(argument, list | bytearray) and argument != now:
        argument[:] = now
    elif isinstance(argument, deque) and argument != now:
        argument.clear()
        argument.extend(now)
    elif isinstance(argument, dict | set) and argument != now:
        argument.clear()
        argument.update(now)
