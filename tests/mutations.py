"""Seeded damage to documents: what a stranger's, a broken or a hand-edited JSON or YAML file may hold."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

Place = tuple[str | int, ...]

# What stands in the place of a value: other types, the ends of ranges, and texts that mean something to somebody.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 4096, 2**31, 2**32, -(2**63), 2**63, 2**70, 10**400),
    *(0.5, -0.5, 1e-308, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "0", "-1", "1e999", "nan", "x", "x" * 300, "null", "true", "${oc.env:HOME}", "???", "[]", "a=b", "a.b"),
    *("../../etc/passwd", "/etc/passwd", "~", ".", "..", "a/b", "a\\b", "\0", "a\0b", "\n", "\x1b[2J", "\x9b31m"),
    *("\ud800", "\u202e", "é" * 5, "step-000001", "step-999999", "train", "val", "lanczos", "bfloat16", "{", "{name}"),
    *([], {}, [[]], [{}], [None], [1, 2, 3], ["a", "b"], [0.5] * 7, {"": 1}, {"a": None}, {"1": {"2": [3]}}),
)


def places(value: Any, path: Place = ()) -> list[Place]:
    """List the paths of all values inside `value`, itself included."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


def mutate(document: Any, generator: random.Random) -> Any:
    """Return a copy of a plain document in which one to three values are changed, moved, doubled or gone."""
    changed = copy.deepcopy(document)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        changed = _mutate_once(changed, generator)
    return changed


def _mutate_once(document: Any, generator: random.Random) -> Any:
    place = generator.choice(places(document))
    if not place:
        return generator.choice(ODD) if generator.random() < 0.2 else document
    *above, last = place
    parent = document
    for key in above:
        parent = parent[key]
    value = parent[last]
    kind = generator.randrange(8)
    if kind < 4:
        parent[last] = copy.deepcopy(generator.choice(ODD))
    elif kind == 4:
        del parent[last]
    elif kind == 5:
        other: Any = document
        for key in generator.choice(places(document)):
            other = other[key]
        parent[last] = copy.deepcopy(other)
    elif kind == 6:
        parent[last] = generator.choice(([value], {"value": value}, str(value)[:100], [value, value]))
    elif isinstance(parent, dict):
        parent[generator.choice((f"{last}s", str(last).upper(), "more", "", "\x1b[1m", "format"))] = value
    else:
        parent.insert(generator.randrange(len(parent) + 1), copy.deepcopy(value))
    return document


def damage(text: bytes, generator: random.Random) -> bytes:
    """Return the bytes of a file after a bad disk, a cut copy or a careless editor."""
    at, length = generator.randrange(len(text)), generator.randrange(1, 20)
    kinds: Sequence[Callable[[], bytes]] = (
        lambda: text[:at],
        lambda: text[:at] + text[at + length :],
        lambda: text[:at] + text[at : at + length] * 3 + text[at + length :],
        lambda: text[:at] + bytes([text[at] ^ 1 << generator.randrange(8)]) + text[at + 1 :],
        lambda: text[:at] + generator.randbytes(length) + text[at + length :],
        lambda: text[:at] + generator.choice((b"[", b"{")) * 3000 + text[at:],
        lambda: text[:at] + generator.choice(_SNIPPETS) + text[at:],
    )
    return generator.choice(kinds)()


_SNIPPETS = (
    *(b"\0", b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"9" * 5000, b'"', b",", b"}"),
    *(b"!!int ''", b"!!float x", b"!!python/object:os.system {}", b"!!binary 'x'", b"!!set {a}", b"2001-01-01", b"&a "),
    *(b"*a", b"<<: {}", b"? ", b"- ", b"\t", b"|\n", b"!!timestamp 1", b"!!bool x", b"!!omap [a]", b"12:30:45", b"%"),
)


def json_mutations(document: Any, seed: int) -> bytes:
    """Return the bytes of a damaged JSON document; a quarter of the seeds damage the bytes instead of the values."""
    generator = random.Random(seed)
    if seed % 4 == 3:
        return damage(json.dumps(document).encode(), generator)
    return json.dumps(mutate(document, generator)).encode()


def yaml_mutations(document: Any, seed: int) -> bytes:
    """Return the bytes of a damaged YAML document, in the same way."""
    import yaml

    generator = random.Random(seed)
    if seed % 2:
        return damage(yaml.safe_dump(document).encode(), generator)
    return yaml.safe_dump(mutate(document, generator), allow_unicode=True).encode("utf-8", "surrogatepass")


_WORDS = (
    *("2001-01-01", "2001-01-01T00:00:00Z", "!!int ''", "!!float ''", "!!int x", "!!bool ''", "!!null x", "!!str"),
    *("!!timestamp ''", "!!timestamp 1", "!!binary x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!seq {}"),
    *("!!python/name:os.system", "!!python/tuple [1]", "!x y", "! y", "&a 1", "*a", "{a: b", "[1, 2", "}", "'", '"'),
    *("0x", "0b", "0o8", "1_000", "_", "1:30", "190:20:30", ".inf", "-.inf", ".nan", "1e400", "1e5", "+1", "- 1"),
    *(
        "null",
        "~",
        "",
        " ",
        "yes",
        "no",
        "on",
        "True",
        "<<: {a: 1}",
        "{<<: 1}",
        "{<<: [1]}",
        "? a",
        "? [a]",
        "{[a]: 1}",
    ),
    *(
        "{1: 2}",
        "{null: 1}",
        "{2001-01-01: 1}",
        "{1.5: 2}",
        "{true: 1}",
        "a: b",
        "a:",
        "- a",
        "# x",
        "%YAML 1.1",
        "---",
    ),
    *("${base}", "${", "$}", "\\${x}", "???", "=", "==", "a=b", "\t", "\n", "\r", "\x85", "\u2028", "\0", "\x1b[2J"),
    *("\x7f", "\ufeff", "\ud800", "9" * 5000, "0." + "1" * 400, "[" * 40, "{a: " * 40, "x" * 70000, "|", ">", "@", "`"),
    *("[[[[1]]]]", "[null]", "[1, a, null]", "[2001-01-01]", "{a: 2001-01-01}", "[!!binary aGk=]", "!!binary aGk="),
)


def word_mutations(keys: Sequence[str], seed: int) -> str:
    """Return a `key=value` word with an odd key, value, or both."""
    generator = random.Random(seed)
    key = generator.choice(keys)
    if generator.random() < 0.25:
        key = generator.choice(
            (
                *(key.upper(), f"{key}.x", f".{key}", f"{key}.", key.replace(".", ".."), key.rpartition(".")[0]),
                *(f"{key}[0]", f"[{key}]", f" {key} ", f"{key}\n", "", ".", "0", "[", "]", "a[", "a]b", "x" * 500),
                *("a.b[c.d", "[0][1]", "__class__", "_metadata", "\x1b[1m", "é", "\ud800", "null", f"-{key}", "1.5"),
            )
        )
    value = json.dumps(generator.choice(ODD)) if generator.random() < 0.3 else generator.choice(_WORDS)
    if generator.random() < 0.2:
        value = generator.choice(("[{}]", "{{a: {}}}", "!!str {}", " {} ", "{}, {}", "'{}'")).replace("{}", value)
    return f"{key}{generator.choice(('=', '=', '=', '=', '==', '', ' = '))}{value}"
