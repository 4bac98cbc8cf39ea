"""A checkpoint folder of openvla-7b's exact sizes with random weights: to try 7B without the download.

    python benchmarks/make_7b_folder.py --out base-7b            15.1 GB in bfloat16, on the disk
    python benchmarks/make_7b_folder.py --out base-7b --base openvla/openvla-v01-7b

Names, shapes and types are the release's, so what converts for, trains or merges a release does the same with this
folder and takes as long; what it predicts means nothing. Matrices are normal with a standard deviation of 0.02, scales
one, biases zero. The tokenizer knows the words of the prompt and no others; `--tokenizer FOLDER` takes the files of a
checkpoint that you have. A few megabytes are made and written at a time; `config.json` comes last, so that a folder
that was cut short is no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vlaft.accounting.meta import meta_model
from vlaft.model.configuration import OpenVLAConfig
from vlaft.model.load import BASES
from vlaft.observation.prompts import BLANK
from vlaft.weights.layout import INDEX_FILE
from vlaft.weights.stream import ShardWriter

SHARD_BYTES = 5 * 10**9
BLOCK = 2**21  # values made at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<PAD>"}


def write_weights(folder: Path, config: OpenVLAConfig) -> None:
    """Write random bfloat16 weights of a model's names and shapes, and their index."""
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = total = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if used and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
        total += size
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(folder / file, {name: ("BF16", shape) for name, shape in shard.items()}) as writer:
            for name, shape in shard.items():
                writer.write_rows(name, _rows(name, shape, generator))
                weight_map[name] = file
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _rows(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    if len(shape) < 2:  # as long as a model is wide
        yield (torch.zeros if name.endswith("bias") else torch.ones)(shape or (1,), dtype=torch.bfloat16)
        return
    rows = max(1, BLOCK // torch.Size(shape[1:]).numel())
    for first in range(0, shape[0], rows):
        block = torch.empty(min(rows, shape[0] - first), *shape[1:])
        yield block.normal_(std=0.02, generator=generator).bfloat16()


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words with Llama's special ids; prompts are about as long as with Llama's own."""
    words = ["in", ":", "out", "what", "action", "should", "the", "robot", "take", "to", "?"]
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, BLANK: 29871, "<PAD>": 32000} | {w: n for n, w in enumerate(words, 3)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", choices=sorted(BASES), default="openvla/openvla-7b", help="whose sizes")
    parser.add_argument("--tokenizer", type=Path, help="checkpoint folder whose tokenizer files are copied")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        print(f"{options.out} is there already; name another folder", file=sys.stderr)
        return 1
    if options.tokenizer and not (options.tokenizer / "tokenizer.json").is_file():
        print(f"{options.tokenizer} has no tokenizer.json", file=sys.stderr)
        return 1
    config = OpenVLAConfig(**BASES[options.base])
    size = 2 * sum(tensor.numel() for tensor in meta_model(config).state_dict().values())
    existing = next(folder for folder in (options.out, *options.out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        print(f"{options.out}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer:
        for name in TOKENIZER_FILES:
            if (options.tokenizer / name).is_file():
                shutil.copyfile(options.tokenizer / name, options.out / name)
    else:
        write_tokenizer(options.out)
    write_weights(options.out, config)
    content = {"model_type": "openvla", "torch_dtype": "bfloat16"} | BASES[options.base]
    (options.out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{options.out}: {size / 1e9:.2f} GB of random weights in the sizes of {options.base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
