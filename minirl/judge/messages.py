"""Send values between processes: data with its types as JSON, and references to anything else.

Nothing is pickled: unpickling runs code of the sender's choice, and the sender may be a program that a model wrote.
"""

import builtins
import datetime
import json
import os
import struct
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction

FRAME = struct.Struct(">I")  # number of bytes of the JSON that follows
MAX_MESSAGE = 16 * 2**20  # bytes; otherwise a program could fill the memory of its tester
LARGE = 2**63  # integers from here on are sent in hexadecimal: reading decimal digits takes quadratic time
DATES = (datetime.datetime, datetime.date, datetime.time)  # in this order, as a datetime is also a date


def encode(value, refer):
    """Return data as JSON with its types (a tuple is no list); `refer(value)` returns the message for anything else.

    Methods of the built-in type are called, as in `deque.__iter__(value)`: a subclass of the program's may override
    them and show another content to each reader.
    """
    match value:
        case None | bool():
            return value
        case float():
            return float(value)
        case str():
            return str.__str__(value)
        case int():
            return int(value) if -LARGE < value < LARGE else ["int", hex(value)]
        case complex():
            return ["complex", value.real, value.imag]
        case bytes() | bytearray():
            return [type(value).__name__, bytes(value).hex()]
        case range():
            return ["range", value.start, value.stop, value.step]
        case Fraction():
            return ["Fraction", hex(value.numerator), hex(value.denominator)]
        case Decimal():
            return ["Decimal", Decimal.__str__(value)]
        case datetime.datetime() | datetime.date() | datetime.time():
            base = next(b for b in DATES if isinstance(value, b))
            return [base.__name__, base.isoformat(value)]
        case datetime.timedelta():
            return ["timedelta", value.days, value.seconds, value.microseconds]
        case deque():
            return ["deque", value.maxlen, *(encode(item, refer) for item in deque.__iter__(value))]
        case list() | tuple() | set() | frozenset():
            base = next(b for b in (list, tuple, set, frozenset) if isinstance(value, b))
            return [base.__name__, *(encode(item, refer) for item in base.__iter__(value))]
        case dict():  # a defaultdict, too
            kind = "Counter" if isinstance(value, Counter) else "dict"
            return [kind, *([encode(k, refer), encode(v, refer)] for k, v in dict.items(value))]
    return refer(value)


def decode(message, resolve):
    """Read what `encode` has written; `resolve(kind, rest)` returns the value of a reference."""
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
        case "Fraction":
            return Fraction(*(int(part, 16) for part in rest))
        case "Decimal":
            return Decimal(str(*rest))
        case "datetime" | "date" | "time":
            return getattr(datetime, kind).fromisoformat(*rest)
        case "timedelta":
            return datetime.timedelta(*rest)
        case "deque":
            return deque((decode(item, resolve) for item in rest[1:]), rest[0])
        case "dict" | "Counter":
            items = {decode(k, resolve): decode(v, resolve) for k, v in rest}
            return Counter(items) if kind == "Counter" else items
    return resolve(kind, rest)


class Channel:
    """Send and receive messages over two pipes; EOFError or BrokenPipeError if the other end is closed."""

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = reading, writing

    def send(self, message) -> None:
        body = json.dumps(message).encode()
        if len(body) > MAX_MESSAGE:
            raise ValueError(f"a value of {len(body)} bytes")
        send(self.writing, body)

    def receive(self):
        (size,) = FRAME.unpack(read_exactly(self.reading, FRAME.size))
        if size > MAX_MESSAGE:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(read_exactly(self.reading, size))


def send(fd: int, body: bytes | bytearray) -> None:
    """Write a frame: its size and its body, of which no copy is made."""
    parts = [memoryview(FRAME.pack(len(body))), memoryview(body)]
    while any(parts):
        sent = os.writev(fd, parts)
        parts = [parts[0][sent:], parts[1][max(0, sent - len(parts[0])) :]]


def read_exactly(fd: int, size: int) -> bytes:
    """Read `size` bytes; EOFError if the file ends before."""
    parts = []
    while size:
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
