"""The README.md of an export, as the Hub shows it: where the model comes from, what it was taught, how good it is.

Its text is in `card.md.j2`.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vlaft.model.configuration import Policy
from vlaft.observation.images import ImagePipeline
from vlaft.release.layout import public_name
from vlaft.release.verify import Comparison
from vlaft.weights.layout import is_hub_name

CARD_FILE = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SIGNS = re.compile(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)")  # what Markdown reads as more than itself
_METHODS = {
    "full": "all parameters",
    "frozen-vision": "all but the vision backbone",
    "last-layer": "the language model's embeddings, last layer and head",
    "sandwich": "the vision backbone, the projector, and the language model's embeddings, last layer and head",
}


def write_model_card(
    folder: Path,
    kind: str,
    statistics: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    comparison: Comparison | None = None,
) -> None:
    """Write `README.md` for an export that comes from a run; for one that does not, write nothing.

    Args:
        folder: the export.
        kind: `huggingface`, `nf4`, `int8`, `oft` or `adapter`.
        statistics: dataset statistics, by name.
        record: what `merge.json` has: `base`, `base_licence`, `training`, `verified`, `rounding`.
        config: the model's `config.json`.
        comparison: how a quantised export's answers compare with the checkpoint that it was made from.
    """
    training = (record or {}).get("training")
    if record is None or not isinstance(training, Mapping):
        return
    base = str(record.get("base") or "unknown")
    head: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    head |= {"pipeline_tag": "robotics", "tags": ["robotics", "vision-language-action", "openvla", "vlaft"]}
    head["license"] = record.get("base_licence") or "other"
    if _is_link(base):
        head["base_model"] = base
    text = _template().render(
        kind=kind,
        head=yaml.safe_dump(head, sort_keys=False),
        base=public_name(base),
        link=base if _is_link(base) else None,
        licence=record.get("base_licence"),
        training=training,
        settings=_settings(training),
        statistics=statistics,
        measured=training.get("measured") or {},
        verified=record.get("verified"),
        rounding=record.get("rounding"),
        comparison=comparison,
        policy=_policy(config, statistics),
        pipeline=ImagePipeline.from_checkpoint(config) if isinstance(config.get("image_pipeline"), Mapping) else None,
        llama=str(config.get("llm_backbone_id", "")).startswith(("llama2", "vicuna")),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _policy(config: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a policy reads and writes, as the card tells it; None of the released one."""
    policy = Policy.of(config, "config.json")
    if policy == Policy():
        return None
    sizes = [len(entry["action"]["q01"]) for entry in statistics.values()]
    places = ", ".join(f"{_text(camera)}: frame_{number}" for number, camera in enumerate(policy.cameras, start=1))
    several = len(policy.cameras) > 1
    return {
        "cameras": policy.cameras,
        "frames": Markup("{" + places + "}" if several else "frame"),
        "state": policy.state_size if policy.state else None,
        "film": policy.film,
        "chunk": policy.chunk,
        "size": policy.action_size or max(sizes, default=0),
        "head": "an L1 head" if policy.head == "l1" else "action tokens",
        "normalization": {"q99": "the 1st and the 99th percentile", "minmax": "the least and the largest value"}[
            policy.normalization
        ],
    }


def _text(name: str) -> str:
    """Return a name as a text in Python, in a block of code, which a backtick might end."""
    return json.dumps(_one_line(name).replace("`", ""), ensure_ascii=False)


def _template() -> Template:
    """Return the card's template, whose values become Markdown that shows them as they are."""
    environment = Environment(
        loader=PackageLoader("vlaft", ""),
        autoescape=True,  # so that what has been escaped is told apart, and not escaped again
        finalize=lambda value: value if isinstance(value, Markup) else Markup(plain_text(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=_code, shell=_shell)
    return environment.get_template("release/card.md.j2")


def _settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return how it was trained, as the table of the card has it; None is left out."""
    lora = training.get("lora")
    if isinstance(lora, Mapping):
        alpha = lora.get("alpha")
        taught = (
            f"LoRA of rank {lora.get('rank')}, alpha {min(int(lora.get('rank') or 0), 16) if alpha is None else alpha}"
        )
        taught += "".join(f", {word}" for key, word in (("dora", "DoRA"), ("rslora", "rsLoRA")) if lora.get(key))
    else:
        taught = _METHODS.get(str(training.get("method")), str(training.get("method")))
    return {
        "Recipe": training.get("recipe"),
        "Trained": taught,
        "Base in training": f"quantised to {training['quantize']}"
        if training.get("quantize") not in (None, "none")
        else None,
        "Parameters trained": _count(training.get("parameters", {}).get("trainable")),
        "Checkpoint": training.get("checkpoint"),
        **{key.replace("_", " ").capitalize(): value for key, value in (training.get("train") or {}).items()},
        "Image augmentation": {True: "yes", False: "no"}.get(training.get("augment")),  # type: ignore[arg-type]
    }


def plain_text(value: Any) -> str:
    r"""Return a name from data as Markdown that shows it as it is: no links, no HTML, no lines of its own.

    >>> plain_text("my_robot <b>|[a](b)")
    'my_robot &lt;b&gt;\\|\\[a\\](b)'
    """
    return _SIGNS.sub(r"\\\g<0>", html.escape(_one_line(str(value)), quote=False))


def _code(name: str) -> Markup:
    """Return a name as code; a backtick, which would end it, becomes an apostrophe."""
    return Markup("`" + _one_line(name).replace("`", "'") + "`")


def _shell(word: str) -> Markup:
    """Return a word of a command in a block of code, which a backtick might end."""
    return Markup(shlex.quote(_one_line(word).replace("`", "")))


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _is_link(base: str) -> bool:
    """Say whether the base is a repository on the Hub, by a name that any may have."""
    return is_hub_name(base) and _HUB_NAME.fullmatch(base) is not None


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
