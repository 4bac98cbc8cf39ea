"""Plain values that somebody else wrote (JSON, YAML), held against type hints: one checker for every document.

A dataclass is the description of a document: its fields are the keys, their hints the kinds of values, and its
`__post_init__` may refuse what no hint can say with a `ValueError`. Keys that it does not name are left alone, as
another version of vlaft may have written them.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
_LARGEST = 2**63 - 1  # what a 64-bit integer holds; larger ones are of no use and slow to turn into text
_SHOWN = 60  # characters of a wrong value that a sentence shows


class WrongValue(ValueError):
    """A document is not what its dataclass says; the text names the key and what has to be there."""


def read_as(kind: type[T], value: object, place: str = "") -> T:
    """Return a document as the dataclass `kind`: lists become tuples where the hint says so.

    Args:
        kind: a dataclass; its fields without a default are required.
        value: what was parsed.
        place: key of the value within the document, for the message.

    Raises:
        WrongValue: a key is missing or holds something else, or the dataclass refuses the values.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Point:
    ...     x: int
    ...     name: str | None = None
    >>> read_as(Point, {"x": 3, "more": []})
    Point(x=3, name=None)
    >>> read_as(Point, {"x": True})
    Traceback (most recent call last):
    vlaft.documents.WrongValue: x must be a whole number, not True
    """
    if not isinstance(value, Mapping):
        raise WrongValue(f"{place or 'it'} must be a mapping of keys to values, not {shown(value)}")
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        key = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            values[field.name] = _converted(value[field.name], hints[field.name], key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise WrongValue(f"'{key}' is missing")
    try:
        return kind(**values)
    except WrongValue:
        raise
    except ValueError as error:
        raise WrongValue(f"{place}: {error}" if place else str(error)) from None


def fits(value: object, hint: Any) -> bool:
    """Say whether a plain value is what a type hint says; True and False are no numbers, and whole numbers are floats.

    >>> fits(1, float), fits(True, int), fits([1, "a"], list[int]), fits("x", Literal["x", "y"])
    (True, False, False, True)
    """
    try:
        _converted(value, hint, "")
    except WrongValue:
        return False
    return True


def _converted(value: Any, hint: Any, key: str) -> Any:
    """Return a value as its hint says, or raise `WrongValue`."""
    origin, arguments = get_origin(hint), get_args(hint)
    wrong = WrongValue(f"{key} must be {in_words(hint)}, not {shown(value)}")
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        kinds = [part for part in arguments if part is not type(None)]
        if len(kinds) == 1 and value is not None and is_dataclass(kinds[0]):
            return _converted(value, kinds[0], key)  # says what is wrong inside
        chosen = next((part for part in arguments if fits(value, part)), None)
        if chosen is None:
            raise wrong
        return _converted(value, chosen, key)
    if is_dataclass(hint) and isinstance(hint, type):
        return read_as(hint, value, key)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise wrong
        return value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise wrong
        kinds = [arguments[0]] * len(value) if origin is list or arguments[-1] is ... else list(arguments)
        if len(kinds) != len(value):
            raise wrong
        parts = [
            _converted(part, kind, f"{key}[{at}]") for at, (part, kind) in enumerate(zip(value, kinds, strict=True))
        ]
        return parts if origin is list else tuple(parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {
            _converted(name, arguments[0], f"a key of {key}"): _converted(part, arguments[1], f"{key}.{shown(name)}")
            for name, part in value.items()
        }
    if not _is_plain(value, hint):
        raise wrong
    return float(value) if hint is float else value


def _is_plain(value: object, hint: Any) -> bool:
    if hint in (None, type(None)):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int):
        return hint in (int, float) and abs(value) <= _LARGEST
    if isinstance(value, float):
        return hint is float and isfinite(value)
    if isinstance(value, str):
        return hint is str and "\0" not in value and is_text(value)
    return False


def is_text(text: str) -> bool:
    """Say whether a text can be written as UTF-8; bytes of a command line and halves of JSON's pairs may not be."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def in_words(hint: Any) -> str:
    """Return a type hint in words.

    >>> in_words(int | None), in_words(Literal["none", "all"]), in_words(tuple[float, float])
    ('a whole number or null', 'one of none, all', 'a list of 2 numbers, such as [0.9, 0.9]')
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is Literal:
        names = ", ".join(str(argument) for argument in arguments)
        return f"one of {names}" if len(arguments) > 1 else f"'{names}'"
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {len(arguments)} numbers, such as [{', '.join('0.9' for _ in arguments)}]"
    if origin in (list, tuple):
        return "a list of texts, such as [a, b]" if arguments[0] is str else f"a list of ({in_words(arguments[0])})"
    if (isinstance(origin, type) and issubclass(origin, Mapping)) or is_dataclass(hint):
        return "a mapping of keys to values"
    return _PLAIN.get(hint, "something")


def shown(value: object) -> str:
    r"""Return a value for a sentence, cut where it is long.

    >>> shown("a\nb"), shown("x" * 100)[-8:]
    ("'a\\nb'", "xxx ...'")
    """
    if isinstance(value, str):
        return repr(value[:_SHOWN] + (" ..." if len(value) > _SHOWN else ""))
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes out
        return "a very large value"
    return text[:_SHOWN] + (" ..." if len(text) > _SHOWN else "")


MAX_DEPTH = 10  # of nested mappings and lists; settings need five
_FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_PREFIX = "tag:yaml.org,2002:"
_OTHER_TYPES = ("timestamp", "binary", "set", "omap", "pairs")


class NotYaml(ValueError):
    """The text is no YAML of plain values; `line` is where, counted from 1, or None where that is not known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        self.line = line
        super().__init__(reason)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document; of an empty one None.

    Raises:
        NotYaml: it is no YAML, nests too deep, or holds an alias or a value that is not plain.
    """
    import yaml

    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # lazily, so a deep text is left before it gets slow
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise NotYaml(f"nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent):
                raise NotYaml("aliases, *name, are not supported; write the value out")
        return yaml.load(text, _loader())  # a subclass of SafeLoader
    except NotYaml:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise NotYaml(str(error.problem or error.context), line) from error
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # PyYAML converts scalars without looking at them first: `!!int ''` is an IndexError
        raise NotYaml((str(error).splitlines() or [type(error).__name__])[0]) from error


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        """Without dates, with floats as everybody writes them, and each key once."""

        yaml_implicit_resolvers = {  # noqa: RUF012 (of the class, as in PyYAML)
            first: [
                (tag, expression)
                for tag, expression in resolvers
                if tag not in (f"{_PREFIX}timestamp", f"{_PREFIX}float")
            ]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Refuse a key that is there twice: one of the two would be dropped without a word."""
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{twice}' is there twice", node.start_mark
                )
            return super().construct_mapping(node, deep=deep)

    def refuse(loader: Any, node: Any) -> Any:
        kind = str(node.tag).removeprefix(_PREFIX)
        raise yaml.constructor.ConstructorError(
            None, None, f"values of YAML's type '{kind}' are not supported; write a text in quotes", node.start_mark
        )

    Loader.add_implicit_resolver(f"{_PREFIX}float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+0123456789."))
    for name in _OTHER_TYPES:
        Loader.add_constructor(f"{_PREFIX}{name}", refuse)
    return Loader
