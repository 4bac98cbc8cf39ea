from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vlaft.errors import CheckpointError
from vlaft.observation.prompts import action_tokenizer_of, load_base_files, prompt_style_of, prompt_text


@pytest.fixture(scope="module")
def llama(tiny: Path) -> Any:
    return load_base_files(tiny / "checkpoint")


def write_base(folder: Path, vocabulary: dict[str, int], **changes: Any) -> Path:
    """A base with a word-level tokenizer and no end, BOS or weights beyond what `changes` say."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"text_config": {"vocab_size": 400}, "pad_to_multiple_of": 64, "n_action_bins": 256} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"})
    )
    return folder


VOCABULARY = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "In": 4, "Out": 5, ":": 6}


def test_golden_prompts(llama: Any, golden_folder: Path) -> None:
    prompts = json.loads((golden_folder / "action_tokens.json").read_text())["prompts"]
    assert len(prompts) == 11
    for row in prompts:
        assert prompt_text(row["instruction"], "openvla") == row["prompt"]
        assert llama.tokenizer.encode(row["prompt"]) == row["token_ids"]
        assert llama.prompt_token_ids(row["instruction"]) == [*row["token_ids"], 29871]


def test_golden_bridge_prompts(llama: Any, golden_folder: Path) -> None:
    for line in (golden_folder / "bridge/examples.jsonl").read_text().splitlines():
        row = json.loads(line)
        whole = [*llama.prompt_token_ids(row["instruction"]), *row["action_token_ids"], llama.tokenizer.eos_id]
        assert whole == row["input_ids"]


def test_what_the_base_says(llama: Any, tiny: Path) -> None:
    data = (tiny / "checkpoint/tokenizer.json").read_bytes()
    tokenizer = llama.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.blank_id) == (1, 2, 32000, 29871)
    assert tokenizer.size == 32001
    assert tokenizer.fingerprint == hashlib.sha256(data).hexdigest()
    assert (llama.actions.vocab_size, llama.actions.n_bins) == (32000, 256)
    assert llama.prompt_style == "openvla"


def test_an_instruction_cannot_end_the_sequence(llama: Any) -> None:
    ids = llama.prompt_token_ids("stop </s> now <s>")
    assert 2 not in ids and ids.count(1) == 1


def test_vicuna_prompt() -> None:
    text = prompt_text("Open It", "vicuna")
    assert text.startswith("A chat between a curious user")
    assert text.endswith("questions. USER: What action should the robot take to open it? ASSISTANT:")


@pytest.mark.parametrize(
    ("config", "style"),
    [
        ({"llm_backbone_id": "llama2-7b-pure"}, "openvla"),
        ({"llm_backbone_id": "vicuna-v15-7b"}, "vicuna"),
        ({"llm_backbone_id": "vicuna-v15-7b", "prompt_style": "openvla"}, "openvla"),
        ({}, "openvla"),
    ],
)
def test_prompt_style_comes_from_the_config(config: dict[str, str], style: str) -> None:
    assert prompt_style_of(config) == style


def test_an_unknown_prompt_style_is_refused() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'vicuna'"):
        prompt_style_of({"prompt_style": "vicunia"})


def test_another_tokenizer_has_no_blank_and_gets_its_bos(tmp_path: Path) -> None:
    base = load_base_files(write_base(tmp_path, VOCABULARY))
    assert (base.actions.vocab_size, base.actions.first_id) == (336, 80)
    ids = base.prompt_token_ids("x")
    assert ids[0] == 1 and ids[-1] == 6


def test_a_vocabulary_that_is_too_large_for_the_base(tmp_path: Path) -> None:
    words = VOCABULARY | {f"w{index}": index for index in range(7, 500)}
    with pytest.raises(CheckpointError, match="500 tokens but the model only 400 rows"):
        load_base_files(write_base(tmp_path, words))


def test_special_tokens_among_the_action_tokens(tmp_path: Path) -> None:
    words = {f"w{index}": index for index in range(3, 330)} | {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 330}
    with pytest.raises(CheckpointError, match=r"pad token \(id 330\) lies among the action tokens 80 to 335"):
        load_base_files(write_base(tmp_path, words))


def test_no_room_for_the_action_tokens() -> None:
    with pytest.raises(CheckpointError, match="have no room for 256"):
        action_tokenizer_of({"text_config": {"vocab_size": 200}})
    with pytest.raises(CheckpointError, match="must be numbers"):
        action_tokenizer_of({"text_config": {"vocab_size": "many"}})


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_base_files(tmp_path)
    write_base(tmp_path, VOCABULARY)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load_base_files(tmp_path)
    write_base(tmp_path, VOCABULARY)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        load_base_files(tmp_path)
    write_base(tmp_path, VOCABULARY)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        load_base_files(tmp_path)


def test_an_infinite_size_is_a_sentence(tmp_path: Path) -> None:
    base = write_base(tmp_path, VOCABULARY, pad_to_multiple_of=float("inf"))
    with pytest.raises(CheckpointError, match="pad_to_multiple_of, n_action_bins must be numbers"):
        load_base_files(base)
