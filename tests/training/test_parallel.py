"""Copies, shards, and shards within nodes: one, two and four processes train alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import together
from small_run import Recorder, Small, log_lines, run

from vlaft.training.trainer import train

WORDS = ("data.augment=false", "train.steps=3", "train.save_every=3", "train.evaluate_every=3", "data.val_examples=7")
RECIPES = {
    "lora8": ["train.max_grad_norm=1.0"],
    "full": ["train.max_grad_norm=1.0", "train.gradient_checkpointing=all"],
    "frozen-vision": ["train.gradient_checkpointing=none"],
    "oft": ["policy.chunk=3", "train.learning_rate=1e-4", "train.max_grad_norm=0.5"],
}
CLOSE = 1e-5  # relative: sums over processes are taken in another order


def in_processes(small: Small, out: Path, recipe: str, style: str, count: int, per_node: int | None = None) -> None:
    """Train in so many processes, four examples a step in all."""
    words = [*WORDS, *RECIPES[recipe], f"train.batch_size={4 // count}", f"train.parallel={style}"]
    settings = small.recipe(recipe, *words)
    together(count, lambda rank: train(settings, out, Recorder()) and None, out.parent / "said", per_node=per_node)


def assert_same_losses(out: Path, expected: Path) -> None:
    ours, theirs = log_lines(out), log_lines(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] != []
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "action_l1", "grad_norm", "val_loss", "val_action_l1"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=CLOSE), (key, mine["step"])


@pytest.mark.parametrize(
    ("recipe", "style", "count", "per_node"),
    [
        ("full", "hsdp", 4, 2),
        ("oft", "fsdp", 2, None),
        *(
            pytest.param(recipe, style, count, per_node, marks=pytest.mark.slow)
            for recipe in RECIPES
            for style, count, per_node in [
                ("ddp", 2, None),
                ("ddp", 4, None),
                ("fsdp", 2, None),
                ("fsdp", 4, None),
                ("hsdp", 4, 2),
            ]
        ),
    ],
)
def test_processes_follow_the_same_losses(
    small: Small, tmp_path: Path, recipe: str, style: str, count: int, per_node: int | None
) -> None:
    run(small.recipe(recipe, *WORDS, *RECIPES[recipe]), tmp_path / "one")
    in_processes(small, tmp_path / "more", recipe, style, count, per_node)
    assert_same_losses(tmp_path / "more", tmp_path / "one")
