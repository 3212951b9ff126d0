"""Bound the time and memory of a render of a chat template, which is foreign code, by counting: so it is refused or
rendered alike on every machine.

`_Rewritten` makes the parts of a template's syntax tree pay: loops, macros, operators, comparisons, slices and outputs,
as filters, tests and calls do, in units of about a byte or ten nanoseconds. What multiplies pays before it is done. A
value that holds another one twice, and that one a third twice, is small in memory and has no end when it is written,
compared or hashed: `_weigh` counts it as it is written. What multiplies and no chat template needs is left out: the
global `lipsum`, and the filters and methods that are not in FREE, FILTERS and METHODS.

Jinja's interfaces that this stands on: `Environment._generate`, which may be overridden; `nodes` and NodeTransformer;
`call`, `getattr` and `context_class` of the sandbox.
"""

import json
import operator
import re
import string
import types
from collections.abc import Callable, Iterator

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context as PlainContext
from jinja2.runtime import LoopContext, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, is_internal_attribute, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

UNITS, UNITS_A_BYTE = 64_000_000, 16  # of a render, and more for each byte of the messages as JSON
STEP = 128  # units of a call, of an entry that a filter yields, and of an object that is made
MOST_NODES = 30_000  # of the syntax tree of a template; the longest of known models have 5,000
NODE = 8  # units of a node of the syntax tree, each time that it is run


class TooMuch(Exception):
    """Raised where a template asks for more than a render may cost, or for what is not for templates; says for what."""

    def __init__(self, what: str = "more time or memory than a render may cost"):
        super().__init__(what)


class Meter:
    """Holds what a render may still cost."""

    __slots__ = ("left",)

    def __init__(self, size: int):
        """Begin a render of messages that have so many bytes as JSON."""
        self.left = UNITS + UNITS_A_BYTE * size


class Context(PlainContext):
    """Jinja's context of a render with its meter, which scoped blocks share."""

    def derived(self, locals=None):
        context = super().derived(locals)
        context.meter = self.meter
        return context


def _spend(context, units: int) -> bool:
    meter = context.meter
    if not units >= 0:  # NaN too, with which nothing would ever be too much
        raise TooMuch("a size that is negative or no number")
    meter.left -= units
    if meter.left < 0:
        raise TooMuch
    return True


_bytes = str.__sizeof__  # one to four bytes a character


def _weigh(context, value, indent: int = 0) -> int:
    """Return the bytes of a value when it is written; stop as soon as they are more than what is left."""
    if type(value) is str:
        return _bytes(value)
    total, unit, level, left = STEP, STEP, [value], context.meter.left
    while level:
        below, unit = [], unit + indent
        for x in level:
            kind = type(x)
            if kind is dict:
                total += unit * len(x)
                below += x
                x = x.values()
            elif kind is Namespace:
                x = x._Namespace__attrs.values()
            elif isinstance(x, str):
                total += _bytes(x)
                continue
            elif kind in SCALARS or not isinstance(x, MANY):
                continue
            total += unit * len(x)
            if total > left:
                raise TooMuch
            if kind is not range:
                below += x
        level = below
    return total


SCALARS = (int, float, bool, type(None))
MANY = (list, tuple, dict, range, type({}.keys()), type({}.values()), type({}.items()))


def _length(value) -> int:
    return len(value) if hasattr(value, "__len__") else 0


class _Rewritten(NodeTransformer):
    """Makes the parts of a template pay, by filters whose names no template can write."""

    def __init__(self, escapes: bool):
        self.escapes = escapes  # the template turns escaping on somewhere

    def _private(self, name: str, node, *others):
        return nodes.Filter(node, name, list(others), [], None, None).set_lineno(node.lineno or 1)

    def _paying(self, body: list) -> list:
        """Put a payment before statements that are run many times."""
        units = nodes.Const(NODE * sum(map(_size, body)) + STEP)
        return [nodes.ExprStmt(self._private("(spend)", units)), *body]

    def visit_For(self, node):
        node = self.generic_visit(node)
        if node.test is not None:
            units = nodes.Const(NODE * _size(node.test) + STEP)
            node.test = nodes.And(self._private("(spend)", units), node.test)
        node.iter, node.body = self._private("(walked)", node.iter), self._paying(node.body)
        return node

    def _visit_body(self, node):
        node = self.generic_visit(node)
        node.body = self._paying(node.body)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_Output(self, node):
        """Write constants as they are, and let the others pay."""
        node = self.generic_visit(node)
        for i, child in enumerate(node.nodes):
            if isinstance(child, nodes.Const) and isinstance(child.value, str) and not self.escapes:
                node.nodes[i] = nodes.TemplateData(child.value).set_lineno(child.lineno)
            elif not isinstance(child, nodes.TemplateData | nodes.Const):
                node.nodes[i] = self._private("(escaped)" if self.escapes else "(weighed)", child)
        return node

    def visit_Add(self, node):
        """Let a + b + c pay in one call."""
        operands = []
        while isinstance(node, nodes.Add):
            operands.append(self.visit(node.right))
            node = node.left
        first, *others = (self.visit(node), *operands[::-1])
        if len(others) == 1 and any(map(_is_small, (first, *others))):
            return nodes.Add(first, *others)
        if all(isinstance(part, nodes.Const) and isinstance(part.value, str) for part in (first, *others)):
            return nodes.Const("".join(part.value for part in (first, *others))).set_lineno(node.lineno)
        return self._private("(+)", first, *others)

    def _visit_operator(self, node):
        node = self.generic_visit(node)
        if isinstance(node, nodes.Sub) and _is_small(node.right):
            return node
        return self._private("(operator)", node.left, nodes.Const(node.operator), node.right)

    visit_Sub = visit_Mul = visit_Div = visit_FloorDiv = visit_Mod = visit_Pow = _visit_operator

    def visit_Concat(self, node):
        """Join texts. Jinja escapes the parts where escaping is on, but not constants, joined as it compiles."""
        plain = not self.escapes or _is_constant(node)
        node = self.generic_visit(node)
        if plain:
            return self._private("(~)", *node.nodes)
        node.nodes = [self._private("(escaped)", part) for part in node.nodes]
        return node

    def _visit_splats(self, node):
        """Let the entries of *values and **values pay before they are copied."""
        node = self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._private("(splat)", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = self._private("(splat)", node.dyn_kwargs)
        return node

    visit_Call = visit_Filter = visit_Test = _visit_splats

    def visit_Compare(self, node):
        """Let a comparison pay, but with a constant, which costs little unless it is looked for in something."""
        node = self.generic_visit(node)
        sides, inside = [node.expr, node.ops[0].expr], node.ops[0].op in ("in", "notin")
        if len(node.ops) == 1 and any(isinstance(side, nodes.Const) for side in sides[inside:]):
            return node
        if len(node.ops) == 1 and inside and isinstance(node.expr, nodes.Const):
            node.ops[0].expr = self._private("(searched)", node.ops[0].expr)
            return node
        node.expr = self._private("(weighed)", node.expr)
        for operand in node.ops:
            operand.expr = self._private("(weighed)", operand.expr)
        return node

    def visit_Getitem(self, node):
        node = self.generic_visit(node)
        return self._private("(walked)", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node):
        """Weigh a tuple: as a key it is hashed, with all that it holds."""
        node = self.generic_visit(node)
        plain = node.ctx != "load" or all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else self._private("(weighed)", node)


def _is_constant(node) -> bool:
    """Tell whether Jinja would calculate an expression as it compiles."""
    lazy = any(found.name in LAZY for found in node.find_all(nodes.Filter))
    return not lazy and node.find((nodes.Name, nodes.Call, nodes.NSRef)) is None


LAZY = ("map", "select", "reject", "selectattr", "rejectattr")  # filters that need a context


def _is_small(node) -> bool:
    """Tell whether a node is a whole number with which sums grow slowly."""
    return isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) < 1000


def _size(node) -> int:
    """Count the nodes of a statement or expression, and the characters that it writes as they are."""
    own = 1 + len(node.data) // NODE if isinstance(node, nodes.TemplateData) else 1
    own += 5 * isinstance(node, nodes.Getattr | nodes.Getitem)  # the sandbox takes microseconds to refuse one
    return own + sum(map(_size, node.iter_child_nodes()))


@jinja2.pass_context
def _weighed(context, value):
    """Pay for a value that is written, hashed or compared."""
    if type(value) not in SCALARS:
        meter = context.meter
        meter.left -= _bytes(value) if type(value) is str else _weigh(context, value)
        if meter.left < 0:
            raise TooMuch
    return value


@jinja2.pass_context
def _searched(context, value):
    return value if type(value) is dict else _weighed(context, value)


@jinja2.pass_context
def _walked(context, value):
    _spend(context, 8 * _length(value))
    return value


@jinja2.pass_context
def _splat(context, values):
    _spend(context, STEP * _length(values))
    return values


@jinja2.pass_context
def _escaped(context, value):
    """Pay for a value that may become six times as long as it is escaped."""
    if type(value) not in SCALARS:
        _spend(context, 6 * _weigh(context, value))
    return value


def _made(context, value):
    """Pay for what an operator has made."""
    _spend(context, _bytes(value) if type(value) is str else _cost(value))
    return value


@jinja2.pass_context
def _add(context, made, *others):
    """Add one by one; each sum pays before it is made."""
    size = _cost(made)
    for part in others:
        size += _cost(part) * (6 if hasattr(made, "__html__") else 1)  # as it is escaped
        if hasattr(part, "__html__"):
            size *= 6
        _spend(context, size)
        made = made + part
    _cost(made)
    return made


@jinja2.pass_context
def _concatenate(context, *parts):
    _spend(context, sum(_weigh(context, part) for part in parts))
    return str_join(parts)


def _cost(made) -> int:
    """Return the bytes of a value that an operator made; whole numbers stay within 64 bits."""
    if isinstance(made, str):
        return _bytes(made)
    if isinstance(made, int) and not -(2**63) <= made < 2**63:
        raise TooMuch("a number of more than 64 bits")
    return NODE + 8 * _length(made)


@jinja2.pass_context
def _operate(context, left, symbol: str, right):
    """Calculate - * / // % **; repeated texts and lists, and formats, pay before they are made."""
    if symbol == "*":
        for held, times in ((left, right), (right, left)):
            if hasattr(held, "__len__") and isinstance(times, int):
                each = (1 if held.isascii() else 4) if isinstance(held, str) else 8
                _spend(context, each * len(held) * max(times, 0))
    elif symbol == "**" and isinstance(left, int) and isinstance(right, int) and abs(left) > 1 and right > 64:
        raise TooMuch("a number of more than 64 bits")
    elif symbol == "%" and isinstance(left, str):
        _spend(context, _percent_cost(context, left, right))
    return _made(context, OPERATORS[symbol](left, right))


OPERATORS = {
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
PRIVATE = {
    "(spend)": jinja2.pass_context(_spend),
    "(weighed)": _weighed,
    "(escaped)": _escaped,
    "(searched)": _searched,
    "(walked)": _walked,
    "(splat)": _splat,
    "(+)": _add,
    "(~)": _concatenate,
    "(operator)": _operate,
}


# ---- filters, tests and calls: what each costs beside a step, by its arguments ---------------------------------------


def _paid(function: Callable, cost: Callable) -> Callable:
    """Make a filter or a test pay `cost(context, value, *args, **kwargs)`. What is read twice for it is no iterator,
    which would be empty the second time."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    own = {"eval_context": operator.attrgetter("eval_ctx"), "environment": operator.attrgetter("environment")}.get(kind)

    @jinja2.pass_context
    def run(context, value, *args, **kwargs):
        if type(value) is types.GeneratorType and cost is not _entry_cost:
            value = list(value)
        _spend(context, STEP + cost(context, value, *args, **kwargs))
        if kind is None:
            return function(value, *args, **kwargs)
        found = function(own(context) if own else context, value, *args, **kwargs)
        return _counted(context, found) if type(found) is types.GeneratorType else found

    return run


def _counted(context, values: Iterator) -> Iterator:
    for value in values:
        _spend(context, STEP)
        yield value


def _no_cost(context, *args, **kwargs) -> int:
    return 0


def _entry_cost(context, value, *args, **kwargs) -> int:
    return STEP * _length(value)


def _own_cost(context, value, *args, **kwargs) -> int:
    total = _weigh(context, value)
    for x in args:
        total += _weigh(context, x)
    return total


def _text_cost(context, value, *args, **kwargs) -> int:
    return 6 * _weigh(context, value)  # & is &amp; and there are letters with three capitals


def _sorting_cost(context, value, *args, **kwargs) -> int:
    return 20 * _weigh(context, value)


def _strip_cost(context, text, letters=None) -> int:
    return _weigh(context, text) * max(1, _length(letters))


def _split_cost(context, text: str, sep=None, maxsplit=-1) -> int:
    pieces = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
    return _bytes(text) + STEP * (pieces if maxsplit < 0 else min(pieces, maxsplit))


def _width_cost(context, text: str, width=8, *args) -> int:
    return 2 * _bytes(text) + 4 * abs(width) * (1 + text.count("\t"))


def _sum_cost(context, value, attribute=None, start=0) -> int:
    return _weigh(context, value) * (1 if isinstance(start, int | float) else 1 + len(value))


def _join_cost(context, value, d="", attribute=None) -> int:
    return _weigh(context, value) + _weigh(context, d) * len(value)


def _replace_cost(context, value, old, new, *args, **kwargs) -> int:
    _spend(context, _own_cost(context, value, old, new))
    return _weigh(context, str(new)) * str(value).count(str(old))


def _indent_cost(context, value, width=4, first=False, blank=False) -> int:
    _spend(context, _weigh(context, value))
    return 4 * (str(value).count("\n") + 1) * (max(width, 0) if isinstance(width, int) else len(width))


def _format_cost(context, value, *args, **kwargs) -> int:
    _spend(context, _weigh(context, value))
    return _percent_cost(context, str(value), kwargs or args)


def _percent_cost(context, format: str, values) -> int:
    fields = re.findall(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?", format)
    if any(width == "*" or len(width) > 3 for field in fields for width in field):
        raise TooMuch("a width in a format that is no number of three digits at most")
    return (1 + len(fields)) * _own_cost(context, format, values) + 1000 * len(fields)


def _braces_cost(context, format: str, values) -> int:
    specs = [spec for _, _, spec, _ in string.Formatter().parse(format) if spec is not None]
    if any(re.search(r"\d{4}|{", spec) for spec in specs):
        raise TooMuch("a width in a format that is no number of three digits at most")
    return (1 + len(specs)) * _own_cost(context, format, *values) + 1000 * len(specs)


def _round_cost(context, value, precision=0, method="common") -> int:
    if abs(precision) > 300:
        raise TooMuch("more than 300 digits")
    return 0


def _word_cost(context, value) -> int:
    return _weigh(context, value) * (1 + STEP // 2)


def _truncate_cost(context, value, length=255, killwords=False, end="...", leeway=None) -> int:
    return _weigh(context, value) + _weigh(context, end)


def _center_cost(context, value, width=80) -> int:
    return 2 * _weigh(context, value) + 4 * abs(width)


def _batch_cost(context, value, count, fill_with=None) -> int:
    return STEP * _length(value) + 8 * abs(count)


FREE = ["default", "d", "attr", "first", "last", "length", "count", "abs"]
FILTERS = {
    **dict.fromkeys(["items", "list", "reverse", "map", "select", "reject", "selectattr", "rejectattr"], _entry_cost),
    **dict.fromkeys(["string", "upper", "lower", "capitalize", "title", "safe", "int", "float"], _text_cost),
    **dict.fromkeys(["e", "escape", "forceescape"], _text_cost),
    **dict.fromkeys(["sort", "dictsort", "unique", "groupby", "min", "max"], _sorting_cost),
    "trim": _strip_cost,
    "sum": _sum_cost,
    "join": _join_cost,
    "replace": _replace_cost,
    "indent": _indent_cost,
    "format": _format_cost,
    "round": _round_cost,
    "batch": _batch_cost,
    "slice": _batch_cost,
    "wordcount": _word_cost,
    "truncate": _truncate_cost,
    "center": _center_cost,
    "urlencode": lambda context, value: 12 * _weigh(context, value),  # é is %C3%A9
}
COMPARING = ["==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan", ">=", "ge"]
COMPARING += ["in", "upper", "lower"]
METHODS = {  # of each type those that a template may call
    str: {
        **dict.fromkeys(["startswith", "endswith", "find", "rfind", "index", "rindex", "count"], _own_cost),
        **dict.fromkeys(["removeprefix", "removesuffix", "partition", "rpartition"], _own_cost),
        **dict.fromkeys(["isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"], _own_cost),
        **dict.fromkeys(["islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"], _own_cost),
        **dict.fromkeys(["lower", "upper", "title", "capitalize", "swapcase", "casefold"], _text_cost),
        **dict.fromkeys(["strip", "lstrip", "rstrip"], _strip_cost),
        **dict.fromkeys(["split", "rsplit"], _split_cost),
        **dict.fromkeys(["center", "ljust", "rjust", "zfill", "expandtabs"], _width_cost),
        "splitlines": lambda context, text, *args, **kwargs: _split_cost(context, text),
        "replace": _replace_cost,
        "join": lambda context, text, values: _join_cost(context, values, text),
    },
    dict: {**dict.fromkeys(["get", "items", "keys", "values"], _no_cost), "copy": _entry_cost},
    list: {**dict.fromkeys(["count", "index"], _own_cost), "copy": _entry_cost},
    tuple: dict.fromkeys(["count", "index"], _own_cost),
    float: {"is_integer": _no_cost},
}
OF_LOOPS = {"index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth"}
NAMES_OF_DICT = frozenset(dir(dict))


@jinja2.pass_context
def _tojson(context, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Write JSON without Jinja's own escapes of <, > and & for HTML, which no model was trained on."""
    width = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    if width > 16 or (separators and max(map(len, separators)) > 16):
        raise TooMuch("JSON with an indent or separators of more than 16 characters")
    _spend(context, (12 if ensure_ascii else 3) * _weigh(context, value, width))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _range(*numbers):
    if any(abs(number) > 2**31 for number in numbers):
        raise TooMuch("a range of numbers of more than 32 bits")
    return safe_range(*numbers)


def _not_given(owner: object, method: str) -> str:
    return f"the method {type(owner).__name__}.{method}, which is not among those that minirl gives templates"


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which templates pay for what they do."""

    context_class = Context

    def __init__(self, **options):
        super().__init__(**options)
        free, tests = {name: self.filters[name] for name in FREE}, self.tests
        paid = {name: _paid(self.filters[name], cost) for name, cost in FILTERS.items()}
        self.filters = free | paid | {"tojson": _tojson} | PRIVATE
        self.tests = tests | {name: _paid(tests[name], _own_cost) for name in COMPARING}
        self.globals["range"] = _range
        del self.globals["lipsum"]

    def _generate(self, source, *args, **kwargs):
        waiting, count = [source], 0
        while waiting:
            waiting += waiting.pop().iter_child_nodes()
            count += 1
        if count > MOST_NODES:
            raise TooMuch(f"more than {MOST_NODES:,} operations, each of which takes time to compile")
        escapes = source.find(nodes.EvalContextModifier) is not None
        return super()._generate(_Rewritten(escapes).visit(source), *args, **kwargs)

    def call_filter(self, name, *args, **kwargs):
        """Refuse the filters that make a template pay, by whose names `map` could call them."""
        if isinstance(name, str) and name in PRIVATE:
            raise jinja2.TemplateRuntimeError(f"No filter named {str(name)!r}.")
        return super().call_filter(name, *args, **kwargs)

    def unsafe_undefined(self, obj, attribute):
        if attribute.startswith("_") or is_internal_attribute(obj, attribute):
            return super().unsafe_undefined(obj, attribute)
        return self.undefined(_not_given(obj, attribute), name=attribute, obj=obj, exc=TooMuch)

    def getattr(self, obj, attribute):
        """Take shortcuts to what the sandbox would return, for what templates ask most."""
        kind = type(obj)
        if kind is dict and attribute not in NAMES_OF_DICT:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is LoopContext and attribute in OF_LOOPS) or attribute in METHODS.get(kind, ()):
            return getattr(obj, attribute)
        if kind is Namespace and attribute in obj._Namespace__attrs and attribute[:1] != "_":
            return obj._Namespace__attrs[attribute]
        return super().getattr(obj, attribute)

    def call(__self, __context, __obj, *args, **kwargs):
        __owner = getattr(__obj, "__self__", None)
        if type(__obj) is types.BuiltinMethodType or isinstance(__owner, str):
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            __costs = METHODS.get(str if isinstance(__owner, str) else type(__owner), {})
            if __obj.__name__ not in __costs:
                raise TooMuch(_not_given(__owner, __obj.__name__))
            if args and type(args[0]) is types.GeneratorType:
                args = (list(args[0]), *args[1:])
            _spend(__context, STEP + __costs[__obj.__name__](__context, __owner, *args, **kwargs))
            return __obj(*args, **kwargs)
        __format = getattr(__obj, "__wrapped__", None)  # str.format comes wrapped by the sandbox
        if isinstance(__format, types.BuiltinMethodType | types.MethodType):
            __units = _braces_cost(__context, __format.__self__, (*args, *kwargs.values()))
        else:  # macros take tuples, which they may hash; classes and methods of Python read all
            __whole = isinstance(__obj, types.MethodType | type)
            __units = sum(4 * _weigh(__context, x) for x in args if __whole or type(x) is tuple)
        _spend(__context, STEP + __units)
        return super().call(__context, __obj, *args, **kwargs)
