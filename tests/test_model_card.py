"""Names from data stand in a model card as they are: they make no links, no HTML and no sections."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from vlaft.release.card import plain_text, write_model_card

ODD = "a](http://x) <img src=x>\n# `rm -rf` | *b*"
ENTRY = {"action": {name: [0.0] for name in ("q01", "q99", "mean", "std")} | {"mask": [True]}}
TRAINING = {
    "recipe": ODD,
    "method": "full",
    "checkpoint": "step-000002",
    "parameters": {"trainable": 3, "total": 4},
    "data": [{"name": ODD, "format": "robomimic"}],
    "versions": {"vlaft": ODD},
    "train": {"optimizer": ODD},
}


@pytest.mark.parametrize("kind", ["huggingface", "adapter"])
@pytest.mark.parametrize("base", [f"/models/{ODD.replace('/', '')}", "owner/na](x", "owner/model"])
def test_odd_names_stay_names(tmp_path: Path, kind: str, base: str) -> None:
    record = {"base": base, "base_licence": ODD, "training": TRAINING}
    write_model_card(tmp_path, kind, {ODD: ENTRY}, record, {})
    text = (tmp_path / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head).get("base_model") == (base if base == "owner/model" else None)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", *["h2"] * 5]
    links = [token.attrs["href"] for token in inline if token.type == "link_open"]
    assert links == (["https://huggingface.co/owner/model"] if base == "owner/model" else [])
    assert {token.type for token in [*tokens, *inline]}.isdisjoint({"html_block", "html_inline", "image", "em_open"})
    assert sum(token.type == "fence" for token in tokens) == 1
    shown = [token.content for token in inline if token.type in ("text", "code_inline")]
    assert "<img src=x>" in "".join(shown)  # the name itself is there, to be read


@pytest.mark.parametrize("kind", ["huggingface", "oft"])
def test_a_card_tells_what_a_policy_reads_and_writes(tmp_path: Path, kind: str) -> None:
    policy = {"head": "l1", "chunk": 4, "cameras": ["main", ODD], "state": True, "state_size": 8, "action_size": 7}
    record = {"base": "owner/model", "training": TRAINING}
    write_model_card(tmp_path, kind, {"arm": ENTRY}, record, {"policy": policy})
    text = (tmp_path / "README.md").read_text()
    assert "chunks of 4 actions of 7 numbers, all at once, by an L1 head" in text
    assert "the robot's state of 8 numbers" in text and "state=state" in text and "# [4, 7]" in text
    assert ("--num_images_in_input 2" in text) == (kind == "oft")
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in [*tokens, *inline]}.isdisjoint({"html_block", "html_inline", "image", "em_open"})
    (code,) = (token.content for token in tokens if token.type == "fence")
    call = ast.parse(code).body[2].value  # type: ignore[attr-defined]
    assert [key.value for key in call.args[0].keys] == ["main", ODD.replace("\n", " ").replace("`", "")]


def test_usual_names_are_written_as_they_are() -> None:
    for name in ("bridge_dataset", "openvla-7b", "step-000002", "demos (2)", "0.0005", "π"):
        assert plain_text(name) == name
