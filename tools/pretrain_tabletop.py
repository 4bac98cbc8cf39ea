"""Pretrain the small base of `vlaft demo` on the simulator's first set-up: an hour on two CPU cores.

    python tools/pretrain_tabletop.py --out vlaft/environments/tabletop/base

The model has the release's architecture at a small scale (84 px, two ViTs side by side, Llama). It sees scenes drawn at
random, each labelled by the scripted expert, with camera, light and colours of set-up A varied: a little at first,
widely then. Three things make it learn within the hour, and none of them is left in the checkpoint:

- A frame is seen once and acted on for each of its three objects: three prompts share one image prefix, side by
  side in one sequence, hidden from each other by the attention mask.
- Targets are spread over neighbouring bins, which say more than a single one of 256; the last fifth has hard labels.
- Auxiliary heads read positions off the projected patches and off the last prompt token.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset

from vlaft.action.statistics import compute_statistics
from vlaft.action.tokens import normalize
from vlaft.environments.tabletop.drawing import SIZE, draw
from vlaft.environments.tabletop.recording import expert_action
from vlaft.environments.tabletop.scene import CEILING, REACH, SETUP_A, Colour, Scene, SetUp, new_scene, place_objects
from vlaft.model import OpenVLAConfig, OpenVLAForActionPrediction
from vlaft.observation.augmentation import augment, pixel_values
from vlaft.observation.images import ImagePipeline
from vlaft.observation.prompts import BaseFiles, load_base_files
from vlaft.release.layout import preprocessor_config

BATCH = 48  # frames per update; each has three prompts
BINS, PADDING = 256, 64
PROMPT_WORDS = "In : What action should the robot take to ? Out"
# what a person may ask for on a table; words that set-up A never shows keep the embedding that they began with
VOCABULARY = """
a an and at away back behind between block blue book bottle bowl box brown button can close cube cup cyan disc drawer
drop faucet from front gray green gripper hand handle in into item it left lid lift magenta move near object of on one
open orange out over pick pink place plate purple push put red release right rope slide square stack table tan tool top
touch towel turn up white yellow
"""
ACTIONS, LABELS = 7, 8  # the action tokens, and the end of the sequence behind them


# ------------------------------------------------------------------------------------------------- scenes and labels


def near(colour: Colour, width: float, generator: Generator) -> Colour:
    """Return a colour close to another one."""
    r, g, b = np.clip(np.asarray(colour) + generator.normal(0, width, 3), 0, 255)
    return float(r), float(g), float(b)


def nearby(generator: Generator) -> SetUp:
    """Return set-up A seen by a slightly different camera in a slightly different light."""
    lights = (near(SETUP_A.lights[0], 10, generator), near(SETUP_A.lights[1], 10, generator))
    return replace(
        SETUP_A,
        objects={word: near(colour, 12, generator) for word, colour in SETUP_A.objects.items()},
        camera_angle=float(generator.uniform(-0.08, 0.08)),
        scale=SETUP_A.scale * float(generator.uniform(0.95, 1.05)),
        shift=(float(generator.uniform(-2.5, 2.5)), SETUP_A.shift[1] + float(generator.uniform(-2.5, 2.5))),
        table=near(SETUP_A.table, 14, generator),
        checker=float(generator.uniform(0, 4)),
        surroundings=near(SETUP_A.surroundings, 20, generator),
        gripper=near(SETUP_A.gripper, 10, generator),
        lights=lights,
        brightness=float(generator.uniform(0.85, 1.15)),
    )


def varied(generator: Generator) -> SetUp:
    """Return set-up A's robot and words in a room of any colours, also with discs for blocks."""

    def any_colour(low: float = 20.0, high: float = 240.0) -> Colour:
        r, g, b = generator.uniform(low, high, 3)
        return float(r), float(g), float(b)

    disc = generator.random() < 0.4
    return replace(
        SETUP_A,
        objects={word: near(colour, 16, generator) for word, colour in SETUP_A.objects.items()},
        noun="disc" if disc else "block",
        shape="disc" if disc else "block",
        camera_angle=float(generator.uniform(-0.12, 0.12)),
        scale=SETUP_A.scale * float(generator.uniform(0.93, 1.07)),
        shift=(float(generator.uniform(-4, 4)), SETUP_A.shift[1] + float(generator.uniform(-4, 4))),
        table=near((160, 155, 150), 32, generator),
        checker=float(generator.uniform(0, 12)),
        surroundings=any_colour(),
        gripper=any_colour(),
        lights=(any_colour(60, 255), any_colour(60, 255)) if generator.random() < 0.6 else SETUP_A.lights,
        brightness=float(generator.uniform(0.8, 1.15)),
    )


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        look: draws what a scene looks like.
        steps: updates.
        rate: highest learning rate; it falls to a fiftieth along a cosine.
        shares: of scenes with the gripper anywhere, near an object, over it, holding it, and closed around nothing.
        low: highest z of those over an object.
        spread: standard deviation of the labels in bins, in the first half and up to 80 %; then labels are hard.
        auxiliary: weight of the heads that tell positions.
        seed: of scenes, batches and new layers.
    """

    look: Callable[[Generator], SetUp]
    steps: int
    rate: float
    shares: tuple[float, float, float, float, float]
    low: float
    spread: tuple[float, float]
    auxiliary: float
    seed: int


# Closing and lifting are a tenth of an episode's steps each, but decide it: the later parts see more of them. And a
# model that has seen rooms of one colour only is hard to bring to another one with fifty demonstrations.
_OFTEN_CLOSE = (0.22, 0.26, 0.22, 0.18, 0.12)
STAGES = (
    Stage(nearby, 6000, 1.5e-3, (0.30, 0.30, 0.14, 0.16, 0.10), 0.06, (3.0, 1.0), 1.0, seed=0),
    Stage(varied, 4000, 1.2e-3, _OFTEN_CLOSE, 0.05, (2.0, 1.0), 0.5, seed=1),
    Stage(varied, 4500, 1.0e-3, _OFTEN_CLOSE, 0.05, (2.0, 1.0), 0.5, seed=2),
)


def random_scene(generator: Generator, stage: Stage) -> Scene:
    """Return a state that an episode may come through, and some that only a mistake leads to."""
    scene = new_scene(stage.look(generator), generator)
    kind = generator.choice(["far", "near", "aligned", "holding", "empty"], p=stage.shares)
    at = scene.objects[scene.target_index, :2]
    if kind == "far":
        scene.gripper = np.array([*generator.uniform(-REACH, REACH, 2), generator.uniform(0.05, CEILING)])
        return scene
    if kind == "holding":
        scene.is_open, scene.held = False, scene.target_index
        height = generator.uniform(0.0, 0.12)
        scene.gripper = np.array([*place_objects(generator, 1)[0, :2], height])
        others = np.delete(scene.objects, scene.held, axis=0)[:, :2]
        if np.linalg.norm(others - scene.gripper[:2], axis=1).min() < 0.08:
            scene.gripper[:2] = at
        scene.objects[scene.held] = scene.gripper
        return scene
    spread = {"near": 0.03, "aligned": 0.008, "empty": 0.03}[str(kind)]
    place = np.clip(at + generator.normal(0, spread, 2), -REACH, REACH)
    heights = {"near": (0.0, 0.13), "aligned": (0.0, stage.low), "empty": (0.0, 0.10)}[str(kind)]
    scene.gripper = np.array([*place, generator.uniform(*heights)])
    scene.is_open = kind != "empty"
    return scene


def expert_statistics(episodes: int = 300, seed: int = 0) -> dict[str, Any]:
    """Return the dataset statistics of the expert's actions on set-up A."""
    actions = []
    for number in range(episodes):
        scene = new_scene(SETUP_A, np.random.default_rng([seed, number]), noise=0.15)
        rows = []
        while scene.picked_up is None:
            rows.append(expert_action(scene))
            scene.step(rows[-1])
        actions.append(np.stack(rows).astype(np.float32))
    return compute_statistics(actions, mask=[True] * 6 + [False])


@dataclass
class Labeller(IterableDataset):
    """An endless stream of labelled frames.

    Each item: frame uint8 `[84, 84, 3]`; prompt ids int64 `[3, L]`; normalized actions float32 `[3, 7]`; what the
    auxiliary heads are to tell: of the frame float32 `[17]` (see `_frame_facts`), of each prompt float32 `[3, 3]`.
    """

    files: BaseFiles
    statistics: dict[str, Any]
    stage: Stage

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        generator = np.random.default_rng(self.stage.seed)
        while True:
            scene = random_scene(generator, self.stage)
            frame, facts = draw(scene), self._frame_facts(scene)
            prompts, actions, offsets = [], [], []
            for colour in generator.permutation(scene.colours):
                scene.target = str(colour)
                prompts.append(self.files.prompt_token_ids(scene.setup.instruction(scene.target)))
                actions.append(normalize(expert_action(scene), self.statistics["action"]))
                offsets.append((scene.objects[scene.target_index] - scene.gripper) / REACH)
            yield frame, np.asarray(prompts), np.stack(actions), facts, np.asarray(offsets, np.float32)

    @staticmethod
    def _frame_facts(scene: Scene) -> np.ndarray:
        """Gripper x, y, z, open, holding; then for each colour whether it is there, x and y."""
        facts = [*(scene.gripper / REACH), float(scene.is_open), float(scene.held is not None)]
        for colour in SETUP_A.objects:
            there = colour in scene.colours
            place = scene.objects[scene.colours.index(colour), :2] / REACH if there else (0.0, 0.0)
            facts += [float(there), *place]
        return np.asarray(facts, np.float32)


# --------------------------------------------------------------------------------------------------------- the model


def write_blank_base(folder: Path, seed: int) -> Path:
    """Write the base with random weights, its tokenizer and its configuration to a new folder."""
    words = set(re.findall(r"\w+|[^\w\s]", f"{PROMPT_WORDS} {VOCABULARY}".lower())) | {"?", ":"}
    names = ["<unk>", "<s>", "</s>", "<PAD>", "\u2581", *sorted(words)]
    rows = -(-(len(names) + BINS) // 64) * 64  # the action tokens are the last ids below a multiple of 64
    folder.mkdir(parents=True)
    _write_tokenizer(folder, names)
    width = 128
    vit = {"patch_size": 14, "embed_dim": 96, "depth": 4, "num_heads": 3}  # of four blocks, three are run
    config = {
        "model_type": "openvla",
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [SIZE, SIZE],
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "vision_overrides": [vit | {"mlp_ratio": 4.0, "reg_tokens": 4}, vit | {"mlp_ratio": 3.7362}],
        "text_config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": width * 11 // 4,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": rows + PADDING,
            "pad_token_id": names.index("<PAD>"),
            "bos_token_id": names.index("<s>"),
            "eos_token_id": names.index("</s>"),
        },
        "pad_token_id": names.index("<PAD>"),
        "pad_to_multiple_of": PADDING,
        "n_action_bins": BINS,
        "norm_stats": {},
        "torch_dtype": "float16",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    torch.manual_seed(seed)
    save_weights(OpenVLAForActionPrediction(OpenVLAConfig.from_dict(dict(config))), folder)
    return folder


def save_weights(model: OpenVLAForActionPrediction, folder: Path) -> None:
    """Write the weights in float16, in the release's names."""
    _save({name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}, folder)


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, names: list[str]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>", "<PAD>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>"}
    settings = tokens | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", tokens)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Branches(nn.Module):
    """The model on three prompts for each frame, with the auxiliary heads.

    Sequence: `[BOS] [patches] [prompt 1, actions 1] [prompt 2, actions 2] [prompt 3, actions 3]`. Each branch sees the
    prefix and itself, at the positions that it would have alone, so its logits are those of the model alone.
    """

    def __init__(self, model: OpenVLAForActionPrediction, facts: int, offsets: int) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        self.frame_head = nn.Sequential(nn.Linear(model.context_size * width, 192), nn.GELU(), nn.Linear(192, facts))
        self.offset_head = nn.Linear(width, offsets)

    def forward(self, pixels: Tensor, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[B, 3, 8, V]`, the frame's facts `[B, F]`, the prompts' offsets `[B, 3, 3]`.

        Args:
            pixels: `[B, 6, 84, 84]`.
            prompts: int64 `[B, 3, L]`, each beginning with BOS.
            tokens: int64 `[B, 3, 7]`.
        """
        model = self.model
        patches = model.projector(model.vision_backbone(pixels))
        batch, branches, _ = prompts.shape
        text = model.get_input_embeddings()(torch.cat([prompts[:, :, 1:], tokens], dim=2))  # [B, 3, L - 1 + 7, D]
        start = model.get_input_embeddings()(prompts[:, :1, :1])[:, 0]
        length, prefix = text.shape[2], 1 + patches.shape[1]
        sequence = torch.cat([start, patches, text.flatten(1, 2)], dim=1)
        branch = torch.cat([torch.zeros(prefix), torch.arange(1, branches + 1).repeat_interleave(length)])
        causal = torch.ones(len(branch), len(branch), dtype=torch.bool).tril()
        mask = causal & ((branch[:, None] == branch[None]) | (branch[None] == 0))
        positions = torch.cat([torch.arange(prefix), (prefix + torch.arange(length)).repeat(branches)])
        hidden = model.decode(sequence, mask=mask[None, None].expand(batch, 1, -1, -1), position_ids=positions[None])
        wanted = hidden[:, prefix:].unflatten(1, (branches, length))[:, :, -LABELS:]
        logits = model.language_model.lm_head(wanted)
        return logits, self.frame_head(patches.flatten(1)), self.offset_head(wanted[:, :, 0])


# ---------------------------------------------------------------------------------------------------------- training


def spread_targets(actions: Tensor, tokens: Tensor, files: BaseFiles, rows: int, width: float) -> Tensor:
    """Return probabilities `[B, 3, 8, V]`: movements spread over neighbouring bins, all else on one token.

    Args:
        actions: normalized, `[B, 3, 7]`.
        tokens: of these, with the end of the sequence behind: `[B, 3, 8]`.
        files: whose action tokens.
        rows: V.
        width: standard deviation in bins; 0 for hard labels.
    """
    target = F.one_hot(tokens, rows).float()
    if width:
        centers = torch.tensor(files.actions.centers, dtype=torch.float32)
        step = 2.0 / (files.actions.n_bins - 1)
        weights = torch.softmax(-0.5 * ((actions[:, :, :3, None] - centers) / (width * step)) ** 2, dim=-1)
        ids = files.actions.vocab_size - 1 - torch.arange(len(centers))
        target[:, :, :3] = 0
        target[:, :, :3, ids] = weights
    return target


def pretrain(folder: Path, stage: Stage) -> None:
    """Train the base in `folder`, and write the running average of its weights and the expert's statistics there."""
    files = load_base_files(folder)
    statistics = expert_statistics()
    config = json.loads((folder / "config.json").read_text()) | {"norm_stats": {SETUP_A.name: statistics}}
    _write_json(folder / "config.json", config)
    _write_json(folder / "dataset_statistics.json", config["norm_stats"])
    model = OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32).train()
    pipeline = ImagePipeline.from_checkpoint(files.config, files.preprocessor)
    torch.manual_seed(stage.seed)
    network = Branches(model, facts=5 + 3 * len(SETUP_A.objects), offsets=3)
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    stream = iter(DataLoader(Labeller(files, statistics, stage), batch_size=BATCH, num_workers=1, prefetch_factor=4))
    rows, steps, began = config["text_config"]["vocab_size"], stage.steps, time.monotonic()
    for step in range(1, steps + 1):
        done = step / steps
        warm = min(1.0, step / 200)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * warm * (0.5 * (1 + np.cos(np.pi * done)) * 0.98 + 0.02)
        frames, prompts, actions, facts, offsets = next(stream)
        # a third of the frames as training on demonstrations shows them, cropped and recoloured
        frames[: BATCH // 3] = augment(frames[: BATCH // 3])
        tokens = torch.from_numpy(files.actions.encode(actions.numpy())).long()
        end = torch.full_like(tokens[:, :, :1], files.tokenizer.eos_id)
        width = 0.0 if done > 0.8 else stage.spread[done >= 0.5]
        target = spread_targets(actions, torch.cat([tokens, end], dim=2), files, rows, width)
        # plain products: the fused attention of CPUs is slow backwards at this size
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            pixels = pixel_values(frames, pipeline.means, pipeline.stds)
            logits, seen, told = network(pixels, prompts, tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 2), target.flatten(0, 2))
        auxiliary = F.mse_loss(seen.float(), facts) + F.mse_loss(told.float(), offsets)
        optimizer.zero_grad(set_to_none=True)
        (loss + stage.auxiliary * auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            keep = min(0.998, step / (step + 10))
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
        if step % 50 == 0 or step == steps:
            predicted = logits[:, :, :3].argmax(-1)
            error = float((predicted - tokens[:, :, :3]).abs().float().mean()) * 2 / BINS
            grip = float((logits[:, :, 6].argmax(-1) == tokens[:, :, 6]).float().mean())
            seconds = time.monotonic() - began
            print(
                f"step {step}/{steps} loss {loss:.4f} aux {auxiliary:.4f} L1 {error:.4f} grip {grip:.3f}"
                f" {3 * BATCH * step / seconds:.0f} labels/s {seconds:.0f} s",
                flush=True,
            )
        if step % 500 == 0 or step == steps:
            kept = model.state_dict()
            kept = {name: tensor.clone() for name, tensor in kept.items()}
            model.load_state_dict(average)
            save_weights(model, folder)
            model.load_state_dict(kept)


def lengthen_unused_words(folder: Path) -> None:
    """Give the embeddings of words that set-up A never says the length of those that it says; keep their directions.

    As they were drawn, they are a fifth as long, and drown in what the blocks add: to the model they are all one word.
    """
    from safetensors.torch import load_file

    files = load_base_files(folder)
    said = {
        index
        for colour in SETUP_A.objects
        for noun in ("block", "disc")
        for index in files.prompt_token_ids(replace(SETUP_A, noun=noun).instruction(colour))
    }
    weights = load_file(folder / "model.safetensors")
    rows = weights["language_model.model.embed_tokens.weight"].float()
    words = set(files.tokenizer.tokenizer.get_vocab().values())
    length = rows[sorted(said)].norm(dim=1).mean()
    for index in sorted(words - said):
        rows[index] *= length / rows[index].norm().clamp(min=1e-6)
    weights["language_model.model.embed_tokens.weight"] = rows.to(torch.float16)
    _save(weights, folder)


CARD = """---
license: apache-2.0
library_name: vlaft
pipeline_tag: robotics
---
# The base of `vlaft demo`

A vision-language-action model of OpenVLA's architecture at a small scale: {parameters:,} parameters, frames of 84 px,
two ViTs side by side (width 96; three blocks are run), a projector, a Llama of 4 layers and width 128, words for
tokens. It picks up the object of the named colour from the table of vlaft's simulator, set-up A (`tabletop-a`). Its
files are those of an OpenVLA release, in float16.

- Made by `tools/pretrain_tabletop.py` in vlaft's repository: {steps:,} updates of {batch} frames, each labelled by the
  scripted expert for three instructions, {labels:,} labels in all. After the first 6,000 updates, camera, colours and
  shapes of set-up A vary widely. It has seen nothing but pictures that the simulator drew: no robot, no photograph, no
  text but the prompts.
- Measured by that script, on 200 episodes each that it was not trained on: success on set-up A {rate_a:.1%} (95 %
  interval {low_a:.1%} to {high_a:.1%}), on set-up B, the demo's new robot, {rate_b:.1%} ({low_b:.1%} to {high_b:.1%}).
- It is for trying out vlaft, for its tests and for its demo. It is no use on a robot, and says little of how a model
  of 7 billion parameters behaves.
- Of its 4 blocks per ViT the last is kept for the release's layout only; embeddings of words that set-up A does not
  use have random directions.
"""


def write_card(folder: Path) -> None:
    """Let the base act in both set-ups, and write the model card with what came out."""
    from safetensors import safe_open

    from vlaft.evaluation.rollout import evaluate_in

    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    found: dict[str, float] = {}
    for letter in "ab":
        rollout = evaluate_in(str(folder), f"tabletop-{letter}", episodes=200, seed=800_000).rollout
        found |= {f"rate_{letter}": rollout.success_rate}
        found |= dict(zip((f"low_{letter}", f"high_{letter}"), rollout.interval, strict=True))
    steps = sum(stage.steps for stage in STAGES)
    card = CARD.format(parameters=parameters, steps=steps, batch=BATCH, labels=3 * BATCH * steps, **found)
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(card)


def main() -> None:
    """Run the pretraining."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"{options.out} exists; name another folder")
    write_blank_base(options.out, seed=0)
    for stage in STAGES:
        pretrain(options.out, stage)
    lengthen_unused_words(options.out)
    write_card(options.out)


if __name__ == "__main__":
    main()
