"""How to say what to type: words of the command line, and the steps that several sentences propose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vlaft.data.inspection import Inspection
from vlaft.data.layout import StepSpec
from vlaft.data.typed_words import word

NAMED = 5  # episodes named one by one in a sentence


def steps_word(steps: Sequence[StepSpec]) -> str:
    """Return the word that sets the layout's steps, quoted for a shell.

    >>> steps_word(["drop_first", {"rotate": {"degrees": 180}}])
    "steps='[drop_first, {rotate: {degrees: 180}}]'"
    """
    return word("steps", list(steps))


def type_words(inspection: Inspection, *words: str) -> str:
    """Say what to type."""
    verb = "type" if inspection.kind == "source" else "convert the source again with"
    return f"{verb} {' '.join(words)}"


def with_steps(inspection: Inspection, *steps: StepSpec, first: bool = False) -> str:
    """Say how to add steps to the layout's own, which the word would replace otherwise."""
    known = list(inspection.layout.steps)
    return type_words(inspection, steps_word([*steps, *known] if first else [*known, *steps]))


@dataclass
class ProposedSteps:
    """Steps that several sentences propose, so that one word can take them all."""

    inspection: Inspection
    before: list[StepSpec] = field(default_factory=list)
    after: list[StepSpec] = field(default_factory=list)

    def propose(self, *steps: StepSpec, first: bool = False) -> str:
        """Remember the steps and say how to add them alone."""
        (self.before if first else self.after).extend(steps)
        return with_steps(self.inspection, *steps, first=first)

    def together(self) -> list[str]:
        """Return a sentence with all of them, where there is more than one."""
        if len(self.before) + len(self.after) < 2:
            return []
        steps = [*self.before, *self.inspection.layout.steps, *self.after]
        return [f"all steps proposed here, in one word: {type_words(self.inspection, steps_word(steps))}"]


def some_of(names: Sequence[str]) -> str:
    """List the first few names and say how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def full_mask(inspection: Inspection, size: int) -> tuple[bool, ...]:
    """Return the layout's mask, or all True where it says nothing about `size` dimensions."""
    mask = inspection.layout.action_mask
    return tuple(mask) if len(mask) == size else (True,) * size


def step_names(inspection: Inspection) -> list[str]:
    """Return the names of the layout's standardizing steps."""
    return [step if isinstance(step, str) else next(iter(step), "") for step in inspection.layout.steps]
