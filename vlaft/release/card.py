"""The README.md of an export, as the Hub shows it: where the model comes from, what it was taught, how good it is."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlaft.observation.images import ImagePipeline
from vlaft.release.layout import public_name
from vlaft.release.verify import Comparison
from vlaft.weights.layout import is_hub_name

CARD_FILE = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SIGNS = re.compile(r"[\\`*\[\]|~#]|(?<!\w)_|_(?!\w)")  # what Markdown reads as more than itself
_KINDS = {
    "huggingface": "A checkpoint in the layout of the OpenVLA release.",
    "nf4": "Linear weights are held in 4 bits (nf4, bitsandbytes); the head and all else in bfloat16.",
    "int8": "Linear weights are held in 8 bits (bitsandbytes); the head and all else in bfloat16.",
    "adapter": "A LoRA adapter in peft's layout; it needs its base.",
}
_MEASURES = {
    "val_action_l1": "action L1, normalised to [-1, 1]",
    "val_action_accuracy": "share of action tokens that are right",
    "val_loss": "loss",
}
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
        kind: `huggingface`, `nf4`, `int8` or `adapter`.
        statistics: dataset statistics, by name.
        record: what `merge.json` has: `base`, `base_licence`, `training`, `verified`, `rounding`.
        config: the model's `config.json`.
        comparison: how a quantised export's answers compare with the checkpoint that it was made from.
    """
    training = (record or {}).get("training")
    if record is None or not isinstance(training, Mapping):
        return
    base = str(record.get("base") or "unknown")
    licence = record.get("base_licence")
    head: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    head |= {"pipeline_tag": "robotics", "tags": ["robotics", "vision-language-action", "openvla", "vlaft"]}
    head["license"] = licence or "other"
    if _is_link(base):
        head["base_model"] = base
    name = ", ".join(plain_text(name) for name in statistics) or "a robot"
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "---",
        f"# {plain_text(public_name(base))} adapted to {name}",
        f"{_KINDS[kind]} Made with vlaft {plain_text((training.get('versions') or {}).get('vlaft') or '')}".rstrip()
        + ".",
        _training_section(training, base),
        _data_section(training, statistics),
        _measured_section(training, record.get("verified"), record.get("rounding"), comparison, kind),
        _use_section(kind, base, statistics),
        _frames_section(config),
        _licence_section(base, licence, config),
    ]
    (folder / CARD_FILE).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _training_section(training: Mapping[str, Any], base: str) -> str:
    lora = training.get("lora")
    if isinstance(lora, Mapping):
        alpha = lora.get("alpha")
        taught = (
            f"LoRA of rank {lora.get('rank')}, alpha {min(int(lora.get('rank') or 0), 16) if alpha is None else alpha}"
        )
        taught += "".join(f", {word}" for key, word in (("dora", "DoRA"), ("rslora", "rsLoRA")) if lora.get(key))
    else:
        taught = _METHODS.get(str(training.get("method")), str(training.get("method")))
    rows = {
        "Base": base,
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
    cells = {key: plain_text(value) for key, value in rows.items() if value is not None}
    cells["Base"] = f"[{base}](https://huggingface.co/{base})" if _is_link(base) else plain_text(public_name(base))
    return "## Training\n\n" + _table(("", ""), list(cells.items()))


def _data_section(training: Mapping[str, Any], statistics: Mapping[str, Any]) -> str:
    lines = ["## Data and statistics"]
    if sources := training.get("data"):
        keys = ("name", "format", "episodes", "steps", "fps")
        lines.append(_table(keys, [tuple(plain_text(source.get(key, "")) for key in keys) for source in sources]))
    for name, entry in statistics.items():
        action = entry["action"]
        counts = [f"{entry[key]:,} {word}" for key, word in _COUNTS.items() if entry.get(key)]
        lines.append(
            f"Statistics {_code(name)}" + (f" ({', '.join(counts)})" if counts else "") + ", per action dimension:"
        )
        size = len(action["q01"])
        mask = action.get("mask") or [True] * size
        rows = [
            (
                index,
                *(f"{action[key][index]:.5g}" for key in ("q01", "q99", "mean", "std")),
                "yes" if mask[index] else "no",
            )
            for index in range(size)
        ]
        lines.append(_table(("dimension", "q01", "q99", "mean", "std", "normalised"), rows))
    return "\n\n".join(lines)


_COUNTS = {"num_trajectories": "demonstrations", "num_transitions": "steps"}


def _measured_section(
    training: Mapping[str, Any], verified: Any, rounding: Any, comparison: Comparison | None, kind: str
) -> str:
    lines = ["## Measured"]
    measured = training.get("measured") or {}
    rows = [(text, f"{measured[key]:.4f}") for key, text in _MEASURES.items() if isinstance(measured.get(key), float)]
    if rows:
        lines.append(f"On held-out demonstrations, during training, at step {measured.get('step')}:")
        lines.append(_table(("measure", "value"), rows))
    if isinstance(verified, Mapping) and "tokens" in verified:
        # What was rounded is held against the trained weights as they are: that is the model which was measured.
        exact = verified.get("unrounded_tokens") is None
        same = verified["identical_tokens" if exact else "unrounded_tokens"]
        difference = verified["largest_logit_difference" if exact else "unrounded_logit_difference"]
        lines.append(
            f"After merging, {same} of {verified['tokens']} action tokens were those of base and adapter; logits"
            f" differed by at most {difference:.3g}."
        )
    if isinstance(rounding, Mapping):
        lines.append(
            f"Merged weights were rounded to {' and '.join(rounding['to'])} ({rounding['mode']}):"
            f" {rounding['survives']:.1%} of the learned change survived."
        )
    if comparison is not None and kind in ("nf4", "int8"):
        lines.append(
            f"Quantised, {comparison.identical_tokens} of {comparison.tokens} action tokens are those of the checkpoint"
            " it was made from."
        )
    lines.append("Nothing here was measured on a robot.")
    return "\n\n".join(lines)


def _use_section(kind: str, base: str, statistics: Mapping[str, Any]) -> str:
    if kind == "adapter":
        named = shlex.quote(_one_line(public_name(base)).replace("`", ""))
        code = f"vlaft predict ADAPTER_FOLDER --base {named} --image frame.png --instruction 'pick up the cup'"
    else:
        code = "vlaft predict MODEL_FOLDER --image frame.png --instruction 'pick up the cup'"
    keys = ", ".join(_code(name) for name in statistics)
    return f"## Use\n\n```sh\n{code}\n```\n\nKey of the statistics (`unnorm_key`): {keys}."


def _frames_section(config: Mapping[str, Any]) -> str:
    """Say what training did to frames, and what of it others have to do themselves."""
    if not isinstance(config.get("image_pipeline"), Mapping):
        return ""
    pipeline = ImagePipeline.from_checkpoint(config)
    shape = "padded to squares" if pipeline.strategy == "letterbox" else "whatever their aspect ratio"
    seen = f"resized to {pipeline.size} x {pipeline.size} pixels by {pipeline.resize}, {shape} (`{pipeline.strategy}`)"
    crop = "; then random crops of 90 % of the area were taken" if pipeline.center_crop else ""
    rest = f"resize frames by {pipeline.resize} before you give them to its processor, which would do so by bicubic"
    if pipeline.center_crop:
        rest += ", and take the central 90 % of the area, as its evaluation scripts do with `--center_crop True`"
    return (
        f"## Frames\n\nIn training, frames were {seen}{crop}. vlaft does with frames what that asks for. With OpenVLA's"
        f" own code, do it yourself: {rest}. Without it, the model acts differently. `config.json` says so under"
        f" `image_pipeline` and `center_crop` ({str(pipeline.center_crop).lower()})."
    )


def _licence_section(base: str, licence: Any, config: Mapping[str, Any]) -> str:
    stated = (
        f"Its base, {plain_text(public_name(base))}, is under: {plain_text(licence)}."
        if licence
        else f"The licence of its base, {plain_text(public_name(base))}, is not recorded; look it up before publishing."
    )
    llama = str(config.get("llm_backbone_id", "")).startswith(("llama2", "vicuna"))
    derived = " Its language model derives from Llama 2, so that the Llama 2 Community License applies as well."
    return f"## Licence\n\n{stated}{derived if llama else ''}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def plain_text(value: Any) -> str:
    r"""Return a name from data as Markdown that shows it as it is: no links, no HTML, no lines of its own.

    >>> plain_text("my_robot <b>|[a](b)")
    'my_robot &lt;b&gt;\\|\\[a\\](b)'
    """
    return _SIGNS.sub(r"\\\g<0>", html.escape(_one_line(str(value)), quote=False))


def _code(name: str) -> str:
    """Return a name as code; a backtick, which would end it, becomes an apostrophe."""
    return "`" + _one_line(name).replace("`", "'") + "`"


def _one_line(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _is_link(base: str) -> bool:
    """Say whether the base is a repository on the Hub, by a name that any may have."""
    return is_hub_name(base) and _HUB_NAME.fullmatch(base) is not None


def _count(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None
