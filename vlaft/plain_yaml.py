"""YAML that may come from a stranger, as plain values: nothing, truth values, numbers, texts, lists and mappings.

What is small to write and large or slow to load (aliases, deep nesting) is refused, and so are YAML's other types
(dates, sets, bytes). Floats may be written without a dot (`1e-4`), which YAML 1.1 takes for texts; a date that is not
tagged as one is a text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

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
