"""`vlaft train` on upstream's batch, from upstream's first adapter, goes down upstream's losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import base_tensors
from PIL import Image
from safetensors.torch import load_file
from small_base import write_examples
from small_run import run

from vlaft.adapt.adapter import load_adapter_weights
from vlaft.data.convert.run import ConvertRequest, SourceRequest, convert
from vlaft.recipe.resolve import resolve, to_yaml
from vlaft.recipe.settings import RecipeConfig
from vlaft.release.merge import merge
from vlaft.training.events import Listener
from vlaft.training.run import Run
from vlaft.weights.trained import find_trained

IGNORED = -100


def golden_dataset(samples: Path, tiny: Path, folder: Path) -> Path:
    """Store upstream's training batch as a converted dataset."""
    checkpoint = tiny / "checkpoint"
    source = SourceRequest(
        path=samples / "rlds" / "bridge_dataset", preset="bridge", layout={"instruction": "lift the pot"}
    )
    like = folder / "like"
    convert(ConvertRequest(sources=[source], base=str(checkpoint), out=like, workers=1, limit=2))
    tensors = load_file(tiny / "tensors.safetensors")
    examples = json.loads((tiny / "cases.json").read_text())["train"]["examples"]
    images = [np.asarray(Image.open(tiny / example["frame"]).convert("RGB")) for example in examples]
    prompts, tokens = [], []
    for ids, labels in zip(tensors["train.input_ids"], tensors["train.labels"], strict=True):
        first = int((labels != IGNORED).nonzero()[0])
        prompts.append(ids[:first].tolist())
        tokens.append(labels[labels != IGNORED][:-1].tolist())  # the loader adds the end of sequence
    return write_examples(folder / "data", like, images, prompts, tokens).path


@pytest.fixture
def rounded_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round Llama's rotary frequencies to bfloat16, as the golden run did (see tests/model/test_golden_tiny.py)."""
    original = Run.load

    def load(self: Run, **options: bool) -> None:
        original(self, **options)
        rotary = self.model.get_submodule("base_model.model.language_model.model.rotary_emb")
        for name in ("inv_freq", "original_inv_freq"):
            buffer = getattr(rotary, name)
            buffer.copy_(buffer.bfloat16().float())

    monkeypatch.setattr(Run, "load", load)


def begin_from(recipe: RecipeConfig, out: Path, base: Path, adapter: Path) -> None:
    """Leave a run at step 0 whose adapter is the given one, for `--resume`."""
    started = Run(recipe, out, base, Listener())
    started.load()
    load_adapter_weights(started.model, adapter)  # type: ignore[arg-type]
    started.folder.create(to_yaml(recipe), {}, {}, {})
    started.save()


def test_upstreams_trajectory(samples: Path, tiny: Path, tmp_path: Path, rounded_rotary: None) -> None:
    expected = json.loads((tiny / "lora.json").read_text())
    base = tiny / "checkpoint"
    data = golden_dataset(samples, tiny, tmp_path)
    words = [f"base='{base.resolve()}'", f"data.path=['{data.resolve()}']", "data.augment=false", "data.workers=0"]
    words += [f"adapt.lora.alpha={expected['lora_alpha']}", f"train.learning_rate={expected['lr']}"]
    words += [f"train.steps={expected['steps']}", "train.batch_size=4", "train.overfit=4", "train.log_every=1"]
    words += ["train.evaluate_every=0"]
    recipe = resolve("lora8", [], words)
    begin_from(recipe, tmp_path / "run", base, tiny / "adapter_init")
    told = run(recipe, tmp_path / "run", resume=True)
    assert told.banner is not None and told.banner.trainable == expected["trainable_parameters"]
    assert told.losses == pytest.approx(expected["losses"], rel=1e-5)
    merge(find_trained(tmp_path / "run"), base, tmp_path / "merged", dtype="float32")
    merged = base_tensors(tmp_path / "merged")
    for name, norm in expected["merged_norms"].items():
        if name != "language_model.lm_head.weight":  # the golden entry is the head's before merging
            assert float(merged[name].norm()) == pytest.approx(norm, rel=1e-5), name
    # Told as the first loss of a run that starts from the merged model.
    again = replace(recipe, base=str(tmp_path / "merged"), train=replace(recipe.train, steps=1))
    assert run(again, tmp_path / "again").losses == pytest.approx([expected["merged_loss"]], rel=1e-5)
