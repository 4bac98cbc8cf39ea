"""Prompts as text and as token ids, and what of a base checkpoint the data needs: its config and its tokenizer.

Reads `tokenizer.json` with the `tokenizers` library alone: no transformers, no remote code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vlaft.action.tokens import ActionTokenizer
from vlaft.documents import fits, is_text, shown
from vlaft.errors import CheckpointError, DataError, did_you_mean
from vlaft.files import read_json

PromptStyle = Literal["openvla", "vicuna"]
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)

BLANK = "\u2581"  # SentencePiece's blank, id 29871 in Llama's vocabulary
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_QUESTION = "What action should the robot take to {instruction}?"
_TEMPLATES: dict[PromptStyle, str] = {
    "openvla": f"In: {_QUESTION}\nOut:",
    "vicuna": f"{_VICUNA_SYSTEM} USER: {_QUESTION} ASSISTANT:",
}


def prompt_text(instruction: str, style: PromptStyle) -> str:
    """Return the prompt for an instruction, lower-cased as in training; nothing else of it is changed."""
    return _TEMPLATES[style].replace("{instruction}", instruction.lower())


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizer.json` and the ids that matter here.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        size: number of ids, added tokens included (32001 for OpenVLA).
        bos_id: put before every prompt, or None where the vocabulary has no such token.
        eos_id: ends the action.
        pad_id: fills batches.
        blank_id: the blank that stands before the action tokens, or None where the vocabulary has none.
        fingerprint: sha256 of `tokenizer.json`.
    """

    tokenizer: Any
    size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    blank_id: int | None
    fingerprint: str

    @classmethod
    def from_folder(cls, folder: Path) -> TextTokenizer:
        """Read a tokenizer from `tokenizer.json` and whichever of the older files are there.

        Args:
            folder: the checkpoint's; `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` may be
                missing.

        Raises:
            CheckpointError: a file is missing or damaged, or the end-of-sequence token cannot be told.
        """
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        try:
            data = file.read_bytes()
            tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing; save the tokenizer in the fast format") from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is no tokenizer ({str(error)[:100]})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # an instruction that contains "</s>" is text, not the end of the sequence
        tokenizer.encode_special_tokens = True
        names = _read(folder, "special_tokens_map.json") | _read(folder, "tokenizer_config.json")
        added = _read(folder, "added_tokens.json")
        if not fits(added, dict[str, int]):
            raise CheckpointError(f"{folder / 'added_tokens.json'} must map tokens to their ids")

        def token_id(name: str) -> int | None:
            value = names.get(name)
            token = value.get("content") if isinstance(value, dict) else value
            if not isinstance(token, str):
                return None
            found = tokenizer.token_to_id(token)
            return added.get(token) if found is None else found

        eos_id, pad_id = token_id("eos_token"), token_id("pad_token")
        if eos_id is None:
            raise CheckpointError(f"{folder}: its tokenizer files name no end-of-sequence token that it knows")
        return cls(
            tokenizer=tokenizer,
            size=max([tokenizer.get_vocab_size(with_added_tokens=True), *(index + 1 for index in added.values())]),
            bos_id=token_id("bos_token"),
            eos_id=eos_id,
            pad_id=eos_id if pad_id is None else pad_id,
            blank_id=tokenizer.token_to_id(BLANK),
            fingerprint=hashlib.sha256(data).hexdigest(),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the beginning-of-sequence token where there is one."""
        ids = list(self.tokenizer.encode(text, add_special_tokens=True).ids)
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids


@dataclass(frozen=True)
class BaseFiles:
    """What the data needs to know of a base checkpoint; no weights.

    Attributes:
        config: `config.json`.
        preprocessor: `preprocessor_config.json`, or None.
        tokenizer: the text tokenizer.
        actions: the action tokenizer over the same vocabulary.
        prompt_style: which prompt the base was trained with.
    """

    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None
    tokenizer: TextTokenizer
    actions: ActionTokenizer
    prompt_style: PromptStyle

    def prompt_token_ids(self, instruction: str) -> list[int]:
        """Return the prompt's ids: BOS, the text, and the blank that stands before the first action token.

        Training on text gives that blank by itself, since a space precedes the action; without it actions
        degrade (docs/upstream.md, Prompts).

        Raises:
            DataError: the instruction is no text in UTF-8.
        """
        if not is_text(instruction):
            raise DataError(f"the instruction {shown(instruction)} is no text in UTF-8; write it anew")
        ids = self.tokenizer.encode(prompt_text(instruction, self.prompt_style))
        blank = self.tokenizer.blank_id
        return ids if blank is None or ids[-1] == blank else [*ids, blank]


def load_base_files(folder: Path) -> BaseFiles:
    """Read config and tokenizer of a base checkpoint in a folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the vocabulary does not fit.
    """
    config = read_json(folder / "config.json", CheckpointError)
    tokenizer = TextTokenizer.from_folder(folder)
    return BaseFiles(
        config=config,
        preprocessor=preprocessor_of(folder),
        tokenizer=tokenizer,
        actions=_action_tokenizer(config, tokenizer, folder),
        prompt_style=prompt_style_of(config),
    )


def preprocessor_of(folder: Path) -> dict[str, Any] | None:
    """Return a checkpoint's `preprocessor_config.json`, or None where it has none."""
    return _read(folder, "preprocessor_config.json") or None


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of a file that a checkpoint may lack."""
    return read_json(folder / name, CheckpointError) if (folder / name).is_file() else {}


def action_tokenizer_of(config: Mapping[str, Any]) -> ActionTokenizer:
    """Return the action tokenizer of a `config.json`.

    The vocabulary is `text_config.vocab_size - pad_to_multiple_of`, upstream's rule (32064 - 64 = 32000).

    Raises:
        CheckpointError: the sizes are no numbers or leave no room for the action tokens.
    """
    text_config = config.get("text_config") or {}
    try:
        rows = int(text_config.get("vocab_size", 32000))
        padding, n_bins = int(config.get("pad_to_multiple_of", 64)), int(config.get("n_action_bins", 256))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            "config.json: text_config.vocab_size, pad_to_multiple_of, n_action_bins must be numbers"
        ) from error
    if padding < 0 or n_bins < 2 or rows - padding <= n_bins:
        raise CheckpointError(
            f"config.json: {rows} rows of vocabulary, {padding} of them padding, have no room for {n_bins} actions"
        )
    return ActionTokenizer(vocab_size=rows - padding, n_bins=n_bins)


def prompt_style_of(config: Mapping[str, Any]) -> PromptStyle:
    """Return the prompt style: the key `prompt_style` where vlaft wrote it, else by the language model.

    Upstream decides by a substring of the checkpoint's path, so that renaming a folder changes the prompt.

    Raises:
        CheckpointError: `prompt_style` is none that is known.
    """
    style = config.get("prompt_style")
    if style is None:
        return "vicuna" if str(config.get("llm_backbone_id", "")).startswith("vicuna") else "openvla"
    if style not in PROMPT_STYLES:
        raise CheckpointError(
            f"config.json: unknown prompt_style {style!r}{did_you_mean(str(style), [*PROMPT_STYLES])}"
        )
    return style


def _action_tokenizer(config: Mapping[str, Any], tokenizer: TextTokenizer, folder: Path) -> ActionTokenizer:
    actions = action_tokenizer_of(config)
    rows = int((config.get("text_config") or {}).get("vocab_size", 32000))
    if tokenizer.size > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens but the model only {rows} rows"
            " (text_config.vocab_size); they are not of one checkpoint"
        )
    ours = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "blank": tokenizer.blank_id}
    for name, index in ours.items():
        if index is not None and actions.is_action(index):
            raise CheckpointError(
                f"{folder}: the {name} token (id {index}) lies among the action tokens"
                f" {actions.first_id} to {actions.vocab_size - 1}; this tokenizer cannot carry actions"
            )
    return actions
