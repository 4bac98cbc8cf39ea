"""Fill in the tables of docs/datasets.md from the standardizing steps' docstrings and the presets' comments.

Run it by hand after a change: .venv/bin/python tools/document_datasets.py
"""

from __future__ import annotations

import inspect
from pathlib import Path

from vlaft.data.presets import preset_names
from vlaft.data.standardize.steps import STEPS
from vlaft.recipe.resolve import recipes_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "datasets.md"


def steps_table() -> str:
    """Return the table of steps: name, arguments with defaults, first sentence of the docstring."""
    rows = ["| step | arguments | what it does |", "| --- | --- | --- |"]
    for name, function in STEPS.items():
        parameters = list(inspect.signature(function).parameters.values())[1:]
        arguments = ", ".join(
            f"`{parameter.name}`"
            + ("" if parameter.default is inspect.Parameter.empty else f" = {_value(parameter.default)}")
            for parameter in parameters
        )
        rows.append(f"| `{name}` | {arguments} | {_first_paragraph(function.__doc__ or '')} |")
    return "\n".join(rows)


def presets_table() -> str:
    """Return the table of presets: name and the first comment line of the file."""
    rows = ["| preset | for |", "| --- | --- |"]
    for name in preset_names():
        first = (recipes_folder() / "datasets" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        rows.append(f"| `{name}` | {_cell(first.removeprefix('#').strip())} |")
    return "\n".join(rows)


def filled(text: str) -> str:
    """Return the page with its tables as they are to be."""
    for marker, table in (("steps", steps_table()), ("presets", presets_table())):
        start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def _first_paragraph(text: str) -> str:
    return _cell(" ".join(text.strip().split("\n\n")[0].split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
