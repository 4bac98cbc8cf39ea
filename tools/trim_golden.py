"""Make `tests/golden` from the untrimmed golden data: fewer rows and files, no number changed.

    python tools/trim_golden.py ORIGINALS/golden tests/golden

`mini/` is whole there and stays. Of `openvla-tiny` goes what no test compares: the pixel values that its frames give to
the last bit (checked here), the logits of the vocabulary below the action tokens, the copy of the head in the adapters,
the embeddings of tokens that no golden text holds, and the part of the Llama-2 tokenizer that these texts do not use.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

FIRST_LOGIT = 31744  # the first action token; its 256, the pad and what fills the vocabulary are kept
SPECIAL = (0, 1, 2, 29871, *range(3, 259), *range(FIRST_LOGIT, 32064))  # UNK, BOS, EOS, the blank, bytes, and those
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD_COPY = "base_model.model.language_model.lm_head.base_layer.weight"
EVALUATION_IMAGES = ("0", "0.resized_cropped", "1", "1.policy")
FRAMES = (7, 10, 13, 14, 16, 17, 20, 23)  # of bridge/frames224: those that oft-tiny shows
PIXEL_ROWS = 56  # every so many rows of the pixel values


def compress(data: bytes) -> bytes:
    """Return xz data; the settings suit numbers of two and four bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "lc": 0, "lp": 1, "pb": 1, "dict_size": 2**23}]
    return lzma.compress(data, filters=filters)


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def golden_texts(originals: Path, samples: Path) -> set[str]:
    """Return instructions and prompts of all golden files, oft-tiny's too, and of the sample sets."""
    files = [*originals.rglob("*.json"), *samples.glob("expected/*.json")]
    texts: set[str] = set()
    for file in files:
        if "checkpoint" not in file.parts and "mini" not in file.parts:
            texts.update(text for text in strings(json.loads(file.read_text())) if " " in text and len(text) < 300)
    for line in (originals / "bridge/examples.jsonl").read_text().splitlines():
        texts.add(json.loads(line)["instruction"])
    return texts


def merge_names(pieces: list[str], ranks: dict[tuple[str, str], int]) -> Iterator[tuple[str, str]]:
    """Yield the merges of byte-pair encoding in the order in which they are applied to a text."""
    while True:
        found = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not found:
            return
        _, at = min(found)
        yield pieces[at], pieces[at + 1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def trim_tokenizer(source: Path, texts: set[str]) -> tuple[str, set[int]]:
    """Return `tokenizer.json` with the tokens and merges that `texts` use, and the ids of the tokens.

    Byte-pair encoding applies the first merge that fits until none does. Merges that are never applied to a text can
    go without a change in its ids; every id is what it was.
    """
    whole = json.loads(source.read_text())
    model = whole["model"]
    merges = [tuple(merge.split(" ")) for merge in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    used: set[tuple[str, str]] = set()
    for text in texts:
        used.update(merge_names(list("▁" + text.replace(" ", "▁")), ranks))
    pieces = {token for token in model["vocab"] if len(token) == 1 and (token.isascii() or token == "▁")}
    pieces |= {part for merge in used for part in merge} | {"".join(merge) for merge in used}
    pieces |= {character for text in texts for character in text}
    vocabulary = {
        token: index
        for token, index in model["vocab"].items()
        if token in pieces or re.fullmatch(r"<0x..>|<unk>|</?s>", token)
    }
    # An added token takes the first free id where the vocabulary lacks it; all ids below were taken.
    vocabulary |= {added["content"]: added["id"] for added in whole["added_tokens"]}
    model["vocab"] = vocabulary
    model["merges"] = [f"{a} {b}" for a, b in merges if (a, b) in used]
    text = json.dumps(whole, ensure_ascii=False, indent=0) + "\n"
    before, after = Tokenizer.from_file(str(source)), Tokenizer.from_str(text)
    for sample in texts:
        assert before.encode(sample).ids == after.encode(sample).ids, sample
    return text, set(vocabulary.values())


def used_ids(originals: Path) -> set[int]:
    """Return every token id that a golden batch feeds to a model."""
    found: set[int] = set(SPECIAL)
    for file in originals.glob("o*-tiny/**/tensors.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                if name.endswith("input_ids"):
                    found.update(tensors.get_tensor(name).flatten().tolist())
    return found


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    file.write_bytes(save(tensors, metadata={"format": "pt"}))


def trim_checkpoint(source: Path, target: Path, texts: set[str], ids: set[int]) -> None:
    """Write the release folder; its weights are compressed, and rows of embeddings that no text names are zero."""
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copyfile(file, target / file.name)
    tokenizer, pieces = trim_tokenizer(source / "tokenizer.json", texts)
    (target / "tokenizer.json").write_text(tokenizer)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if EMBEDDINGS in tensors:
            kept = torch.zeros(len(tensors[EMBEDDINGS]), dtype=torch.bool)
            kept[sorted(pieces | ids)] = True
            tensors[EMBEDDINGS][~kept] = 0
        (target / (file.name + ".xz")).write_bytes(compress(save(tensors, metadata={"format": "pt"})))


def trim_adapter(source: Path, target: Path) -> None:
    """Write an adapter without peft's copy of the frozen head, which the adapters of `mini/` hold."""
    target.mkdir(parents=True)
    shutil.copyfile(source / "adapter_config.json", target / "adapter_config.json")
    tensors = load_file(source / "adapter_model.safetensors")
    del tensors[HEAD_COPY]
    data = save(tensors, metadata={"format": "pt"})
    (target / "adapter_model.safetensors.xz").write_bytes(compress(data))


def pixel_values(levels: np.ndarray, normalize: list[dict[str, list[float]]]) -> torch.Tensor:
    """Return float32 `[3 * backbones, H, W]` of a frame, as torchvision's `to_tensor` and `normalize` give it."""
    scaled = torch.tensor(levels).permute(2, 0, 1).float() / 255
    parts = []
    for constants in normalize:
        mean, std = (torch.tensor(constants[name])[:, None, None] for name in ("mean", "std"))
        parts.append((scaled - mean) / std)
    return torch.cat(parts)


def trim_tensors(source: Path, target: Path) -> None:
    """Keep what the frames do not give: ids, features, logits from the action tokens on, rows of the pixel values."""
    tensors = load_file(source / "tensors.safetensors")
    cases = json.loads((source / "cases.json").read_text())
    normalize = json.loads((source / "checkpoint/preprocessor_config.json").read_text())["tvf_normalize_params"]
    for row, example in enumerate(cases["train"]["examples"]):
        frame = np.asarray(Image.open(source / example["frame"]).convert("RGB"))
        torch.testing.assert_close(pixel_values(frame, normalize), tensors["train.pixel_values"][row], rtol=0, atol=0)
    del tensors["train.pixel_values"]
    for name in [name for name in tensors if name.endswith("pixel_values")]:
        tensors[name] = tensors[name][:, :, ::PIXEL_ROWS].contiguous()
    for name in [name for name in tensors if name.endswith("label_logits")]:
        tensors[name] = tensors[name][:, FIRST_LOGIT:].contiguous()
    write_tensors(target / "tensors.safetensors", tensors)


def trim_tiny(source: Path, target: Path, texts: set[str], ids: set[int]) -> None:
    trim_checkpoint(source / "checkpoint", target / "checkpoint", texts, ids)
    for name in ("adapter_init", "adapter_step20"):
        trim_adapter(source / name, target / name)
    shutil.copytree(source / "frames", target / "frames", copy_function=shutil.copyfile)
    shutil.copyfile(source / "cases.json", target / "cases.json")
    lora = json.loads((source / "lora.json").read_text())
    del lora["merged_norms"][EMBEDDINGS]  # of all rows; the merge leaves them as they are
    (target / "lora.json").write_text(json.dumps(lora, indent=1) + "\n")
    trim_tensors(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("originals", type=Path, help="the untrimmed golden folder, oft-tiny among it")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    for name in ("openvla-tiny", "bridge"):
        shutil.rmtree(options.target / name, ignore_errors=True)
    texts = golden_texts(options.originals, options.target.parent / "data")
    trim_tiny(options.originals / "openvla-tiny", options.target / "openvla-tiny", texts, used_ids(options.originals))
    (options.target / "bridge/frames224").mkdir(parents=True)
    shutil.copyfile(options.originals / "action_tokens.json", options.target / "action_tokens.json")
    for name in ("examples.jsonl", "dataset_statistics.json", *(f"frames224/{i:02d}.png" for i in FRAMES)):
        shutil.copyfile(options.originals / "bridge" / name, options.target / "bridge" / name)
    images = Path("oft-tiny/data/evaluation_images")
    (options.target / images).mkdir(parents=True, exist_ok=True)
    for name in EVALUATION_IMAGES:
        shutil.copyfile(options.originals / images / f"{name}.png", options.target / images / f"{name}.png")


if __name__ == "__main__":
    main()
