"""Run the tests of a program that does not see them: the tests in one process (the tester), the program in another.

The tester sends names and arguments, the program's process sends results back, both as data (`messages.encode`). So the
program can neither read the tests nor change how they compare, and an object that claims to be equal to everything
never reaches the tester.
"""

import ast
import builtins
import json
import operator
import sys
import types
from collections import deque

from minirl.judge.messages import Channel, decode, encode

MAX_ARGUMENTS = 10_000  # characters of the arguments of an exception


class Failed(BaseException):
    """Raised where the program is wrong: a BaseException, so that no `except Exception` of a test hides it."""


class ProgramError(Exception):
    """Raised for an exception of the program whose class cannot be made here."""


class AtFault(BaseException):
    """Raised where the tests are at fault, not the program.

    That must be certain: a program can starve its tester, and lead the tests to wherever they fail. So what happens
    once it has begun counts against it, but for what it cannot have caused: before its first answer an argument that
    cannot be sent, and an import that failed before it began, too.
    """


# --- the program's side -----------------------------------------------------------------------------------------------


def serve(program: str, channel: Channel) -> None:
    """Run the program once the tester is ready, then answer it until it closes the channel."""
    objects: list[object] = []  # by the number in the references that the tester holds

    def refer(value):
        objects.append(value)
        return ["ref", len(objects) - 1]

    def resolve(kind, rest):
        return objects[rest[0]] if kind == "ref" else scope[rest[0]]

    module = sys.modules["program"] = types.ModuleType("program")  # dataclasses and pickle look its classes up there
    scope = vars(module)
    channel.receive()
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
                after = [encode(part, refer) for part in rest]  # tests may look at a list that the call has changed
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
    """Describe an exception: the names of its class and of those above it, its text, and its arguments, if those are
    data."""
    class_names, text = [above.__name__ for above in type(error).__mro__], _message(error)
    try:
        arguments = [encode(argument, None) for argument in error.args]
        if len(json.dumps(arguments)) > MAX_ARGUMENTS:
            arguments = [text]
    except BaseException:  # the class is the program's own: its attributes may do anything
        arguments = [text]
    return ["raised", class_names, text, arguments]


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


# --- the tester's side ------------------------------------------------------------------------------------------------


class Remote:
    """Stand for a name or an object of the program.

    It is equal to itself alone and has no order: otherwise the program would give the verdict on `f(2) == C(2)`, as C
    is on its side too and may be equal to everything there.
    """

    def __init__(self, tester: "Tester", place: list):
        object.__setattr__(self, "_tester", tester)
        object.__setattr__(self, "_place", place)

    def __call__(self, *args, **kwargs):
        return self._tester.ask("call", self, args, kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tester.ask("get", self, name)

    def __setattr__(self, name: str, value) -> None:
        self._tester.ask("set", self, name, value)

    def __getitem__(self, key):
        return self._tester.ask("item", self, key)

    def __iter__(self):
        return iter(self._tester.ask("list", self))

    def __next__(self):
        try:
            return self._tester.ask("next", self)
        except Exception as error:
            if type(error).__name__ == "StopIteration":
                raise StopIteration(*error.args) from None
            raise


def _operator(name: str):
    """Return an operator between two objects of the program alone. With data beside it the program would see what the
    tests expect and have the last word: `abs(f(2) - 4) < 1e-6` would pass for an object whose difference to everything
    is 0."""

    def apply(self, *other):
        if not all(isinstance(value, Remote) for value in other):
            return NotImplemented
        return self._tester.ask(name, self, *other)

    return apply


for _name in ("len", "bool", "str"):
    setattr(Remote, f"__{_name}__", lambda self, action=_name: self._tester.ask(action, self))
for _name in OPERATORS:
    setattr(Remote, f"__{_name.rstrip('_')}__", _operator(_name))


class Tester:
    """Run tests here and ask the program's process for what they use of it."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.answered = False  # whether the tests have seen anything of the program
        self.missing: set[str] = set()  # modules that could not be imported before it began

    def ask(self, action: str, target: Remote, *rest):
        """Return the program's answer; arguments that it has changed in place are changed here too.

        Failed if the program has ended or sends no message; otherwise the exception that it raised.
        """
        request = [action, *(encode(part, self._refer) for part in (target, *rest))]
        try:
            self.channel.send(request)
        except BrokenPipeError:
            raise Failed("the program ended before its tests") from None
        try:
            answer = self.channel.receive()
            self.answered = True
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

    def _refer(self, value):
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_place")
        kind = Failed if self.answered else AtFault
        raise kind(f"the tests pass a {type(value).__name__} to the program, which cannot be sent")

    def run(self, helpers: str, tests: str, entry: str) -> None:
        """Run the tests; any exception means that the program does not pass. `helpers` is what the tests may call on
        their own side, `entry` the program's function, which they also know as `candidate`; any other name that they do
        not define is the program's."""
        try:
            scope: dict[str, object] = {"__name__": "tests"}
            scope["__builtins__"] = vars(builtins) | {"__import__": self._import}
            above, tree = ast.parse(helpers), ast.parse(tests)
            exec(compile(above, "<helpers>", "exec"), scope)
            self._import_all(above, tree)
        except AtFault:
            raise
        except BaseException as error:
            raise AtFault(f"the tests cannot be read ({type(error).__name__}: {error})") from error
        self.channel.send(["begin"])
        ready = self.channel.receive()
        if ready[0] == "raised":
            raise Failed(f"the program raised {ready[1][0]}: {ready[2]}")
        for name in _free_names(tree) - scope.keys() - vars(builtins).keys():
            scope[name] = Remote(self, ["name", name])
        if entry:
            scope[entry] = scope["candidate"] = Remote(self, ["name", entry])
        exec(compile(tree, "<tests>", "exec"), scope)
        self.ask("name", Remote(self, ["name", "__name__"]))  # a program that has exited has not passed

    def _import_all(self, *trees: ast.Module) -> None:
        """Import what the tests may import later, while nothing but they themselves can be the reason that it fails.
        AtFault for what they surely import."""
        surely = {id(node) for tree in trees for node in tree.body}
        for node in (node for tree in trees for node in ast.walk(tree)):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            wanted = [(name, ()) for name in names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                wanted = [(node.module, names)]
            for module, parts in wanted:
                try:
                    builtins.__import__(module, None, None, parts)
                except (ImportError, OSError) as error:
                    self.missing.add(module)
                    if id(node) in surely:
                        raise AtFault(_not_here(error)) from error
                except Exception:  # the tests see it where they import it
                    pass

    def _import(self, name: str, *rest):
        """Import for the tests and mark an error that is theirs, as they may catch it and raise another."""
        try:
            return builtins.__import__(name, *rest)
        except (ImportError, OSError) as error:
            error.of_the_tests = name in self.missing and not self.answered
            raise


def verdict(channel: Channel, helpers: str, tests: str, entry: str) -> dict:
    """Return {"passed": bool, "why": what went wrong}, and "at_fault" where the tests are, not the program."""
    try:
        Tester(channel).run(helpers, tests, entry)
    except AtFault as error:
        return {"passed": False, "why": str(error), "at_fault": True}
    except (EOFError, BrokenPipeError):
        return {"passed": False, "why": "the program ended before its tests"}
    except Failed as error:
        return {"passed": False, "why": str(error)}
    except BaseException as error:
        why = f"{type(error).__name__}: {_message(error)}".removesuffix(": ")
        if getattr(error, "of_the_tests", False):
            return {"passed": False, "why": _not_here(error), "at_fault": True}
        return {"passed": False, "why": why}
    return {"passed": True, "why": ""}


def _not_here(error: Exception) -> str:
    what = f"{type(error).__name__}: {_message(error)}"
    return f"the tests import what the sandbox does not have ({what}): only Python's standard library is there"


def _free_names(tree: ast.AST) -> set[str]:
    """Return the names that are read and neither assigned, defined nor imported."""
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


def _exception(class_names: list[str], text: str, arguments: list) -> Exception:
    """Rebuild the program's exception: its class by name, derived from the first of its classes that is built in, as
    tests may expect that one. Not StopIteration, which `map` takes for an end: only `next` may say that."""
    found = (getattr(builtins, str(name), None) for name in class_names if not str(name).startswith("Stop"))
    bases = [base for base in found if isinstance(base, type) and issubclass(base, Exception)]
    for base in bases[: len(class_names)]:
        raised = base if base.__name__ == class_names[0] else type(str(class_names[0]), (base,), {})
        for given in (arguments, [text]):
            try:
                return raised(*(decode(argument, None) for argument in given))
            except Exception:  # some classes want other arguments
                pass
    return ProgramError(f"{class_names[0]}: {text}")


def _change(argument, now) -> None:
    """Give an argument of a test the content that the call has left in it."""
    if isinstance(argument, list | bytearray) and argument != now:
        argument[:] = now
    elif isinstance(argument, deque) and argument != now:
        argument.clear()
        argument.extend(now)
    elif isinstance(argument, dict | set) and argument != now:
        argument.clear()
        argument.update(now)
