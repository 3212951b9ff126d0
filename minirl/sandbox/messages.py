"""Values as messages between processes: data with its types, and references to anything else."""

import builtins
import datetime
import json
import os
import struct
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction

FRAME = struct.Struct(">I")  # bytes of what follows, which is JSON
MAX_MESSAGE = 16 * 2**20  # bytes
LARGE = 2**63  # integers from here on travel in hexadecimal: decimal takes quadratic time
DATES = (datetime.datetime, datetime.date, datetime.time)  # a datetime is a date


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
        case Fraction():
            return ["Fraction", hex(value.numerator), hex(value.denominator)]
        case Decimal():
            return ["Decimal", Decimal.__str__(value)]
        case datetime.datetime() | datetime.date() | datetime.time():
            kind = next(k for k in DATES if isinstance(value, k))
            return [kind.__name__, kind.isoformat(value)]
        case datetime.timedelta():
            return ["timedelta", value.days, value.seconds, value.microseconds]
        case deque():
            return ["deque", value.maxlen, *(encode(item, refer) for item in deque.__iter__(value))]
        case list() | tuple() | set() | frozenset():
            kind = next(k for k in (list, tuple, set, frozenset) if isinstance(value, k))
            return [kind.__name__, *(encode(item, refer) for item in kind.__iter__(value))]
        case dict():  # a defaultdict, too
            kind = "Counter" if isinstance(value, Counter) else "dict"
            return [kind, *([encode(k, refer), encode(v, refer)] for k, v in dict.items(value))]
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
        send(self.writing, body)

    def receive(self):
        (size,) = FRAME.unpack(exactly(self.reading, FRAME.size))
        if size > MAX_MESSAGE:
            raise ValueError(f"a message of {size} bytes")
        return json.loads(exactly(self.reading, size))


def send(fd: int, body: bytes) -> None:
    frame = memoryview(FRAME.pack(len(body)) + body)
    while frame:
        frame = frame[os.write(fd, frame) :]


def exactly(fd: int, size: int) -> bytes:
    """EOFError at the end of the file."""
    parts = []
    while size:
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
