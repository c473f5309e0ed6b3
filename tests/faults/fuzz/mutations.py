"""Hostile variants of a valid file: of its JSON value, or of its bytes. A seed gives the same ones on every machine."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

_DEEP = 3_000  # levels: beyond Python's own limit
# What files have held in places where something else belongs, and what is at the edge of what numbers can be.
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 63, 64, 65, 1 << 31, 1 << 63, -(1 << 63), 10**9, 10**40, 10**400),
    *(0.0, -0.5, 0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", "0", "192", "x", "\x00", "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 5_000, "nf4", "fp4", "{{ 1 }}"),
    *("(a+)+$", "(", "[", "*", "bitsandbytes", "qsharded", "llama", "yarn", "dynamic", "F32", "BOOL"),
    *([], [[]], [None], [1, 2], ["x"], [-1, 5], [0] * 300, {}, {"": {}}, {"content": 3}, {"a": [1, {"b": None}]}),
)


def mutated_value(value: Any, random: Random) -> Any:
    """A copy of a JSON value with one to three places changed."""
    result = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(result))
        if not places:
            return random.choice(NASTY)
        container, key = random.choice(places)
        random.choice(_CHANGES)(container, key, random)
    return result


def _places(value: Any) -> Any:
    """(container, key) of every value in it."""
    waiting = [value]
    while waiting:
        at = waiting.pop()
        if isinstance(at, dict | list):
            for key in list(at) if isinstance(at, dict) else range(len(at)):
                yield at, key
                waiting.append(at[key])


def _replace(container: Any, key: Any, random: Random) -> None:
    container[key] = copy.deepcopy(random.choice(NASTY))


def _remove(container: Any, key: Any, random: Random) -> None:
    del container[key]


def _nudge(container: Any, key: Any, random: Random) -> None:
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        container[key] = [value] if random.random() < 0.5 else {"x": value}
    elif abs(value) < 1e300:
        container[key] = random.choice((-value, value + 1, value - 1, value * 2, str(value), float(value), value / 3))
    else:
        container[key] = -value


def _rename(container: Any, key: Any, random: Random) -> None:
    if isinstance(container, dict):
        container[random.choice((f"{key}x", "", "__metadata__", "rope_type", "text_config"))] = container.pop(key)
    else:
        container.append(container[key])


_CHANGES: tuple[Callable[[Any, Any, Random], None], ...] = (_replace, _replace, _replace, _remove, _nudge, _rename)
_NASTY_BYTES = (b"[", b"{", b'"', b"9" * 5_000, b"\xff", b"null", b"NaN", b"-", b",", b"[" * _DEEP)


def mutated_bytes(raw: bytes, random: Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or put in."""
    result = bytearray(raw)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(result) + 1)
        to = min(len(result), at + random.choice((1, 1, 4, 40)))
        kind = random.randrange(5)
        if kind == 0 and at < len(result):
            result[at] = random.randrange(256)
        elif kind == 1:
            del result[at:to]
        elif kind == 2:
            result[at:at] = result[at:to]
        elif kind == 3:
            result[at:at] = random.choice(
                (b"[", b"{", b'"', b"9" * 5_000, b"\xff", b"null", b"NaN", b"-", b",", b"[" * _DEEP)
            )
        else:
            del result[at:]
    return bytes(result)


def hostile(value: Any, random: Random) -> bytes:
    """A JSON text that is near to ``value``'s, or now and then the same."""
    if random.random() < 0.02:
        return json.dumps(value).encode()
    if random.random() < 0.8:
        text = json.dumps(mutated_value(value, random), ensure_ascii=random.random() < 0.9)
        return text.encode(errors="surrogatepass")
    return mutated_bytes(json.dumps(value).encode(), random)
