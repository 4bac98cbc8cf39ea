"""The main memory of a step on a CPU: what has to be held, and what stays in the base's files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import MINI
from safetensors.torch import load_file, save_file
from small_base import write_small_base

from vlaft.accounting.costs import recipe_cost
from vlaft.accounting.main_memory import predict_main_memory
from vlaft.accounting.measure import measure
from vlaft.accounting.parameters import count_parameters
from vlaft.model.load import BASES, base_config
from vlaft.recipe.resolve import resolve


def stored_in(folder: Path, dtype: torch.dtype) -> Path:
    """Write a small base whose tensors are all of one type."""
    write_small_base(folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["lora8", "full", "last-layer", "qlora32"])
def test_own_and_mapped_memory_are_the_live_tensors_of_a_real_step(name: str) -> None:
    if name == "qlora32":
        pytest.importorskip("bitsandbytes")
    base = str(MINI / "fused")
    recipe = resolve(name, [], [f"base='{base}'", "train.batch_size=2"])
    found = predict_main_memory(recipe, base_config(base))
    cost = recipe_cost(recipe, base_config(base), gpu_memory=8 * 10**9, batch_size=2)
    real = measure(recipe, base_config(base), cost, torch.device("cpu"))
    assert found.own + found.mapped == pytest.approx(real.peak_bytes, rel=0.02)
    assert found.moment


def test_only_frozen_weights_that_are_stored_as_they_are_needed_stay_in_the_files(tmp_path: Path) -> None:
    stored = {dtype: stored_in(tmp_path / str(dtype), dtype) for dtype in (torch.float32, torch.bfloat16)}

    def mapped(dtype: torch.dtype, name: str, *words: str) -> tuple[int, int]:
        """Return what is predicted to be mapped, and the bytes of the base's frozen weights in that type."""
        base = str(stored[dtype])
        recipe = resolve(name, [], [f"base='{base}'", "train.batch_size=1", *words])
        counted = count_parameters(recipe, base_config(base))
        return predict_main_memory(recipe, base_config(base)).mapped, (
            counted.total - counted.trainable
        ) * dtype.itemsize

    whole, frozen = mapped(torch.float32, "lora8")
    assert whole == frozen > 0
    assert mapped(torch.bfloat16, "lora8")[0] == 0  # on a CPU they are needed in float32
    assert mapped(torch.bfloat16, "lora8", "precision.frozen=bfloat16") == (frozen // 2, frozen // 2)
    assert 0 < mapped(torch.float32, "last-layer")[0] < whole  # what is trained is written to
    assert 0 < mapped(torch.float32, "lora8", "adapt.quantize=nf4")[0] < whole  # packed weights are made


def test_a_base_that_is_not_here_is_stored_as_its_configuration_says(tmp_path: Path) -> None:
    config = base_config(str(write_small_base(tmp_path / "base")))
    recipe = resolve("lora8", [], ["base=some/model", "train.batch_size=1", "precision.frozen=bfloat16"])
    config.dtype = torch.float32
    assert predict_main_memory(recipe, config).mapped == 0
    config.dtype = torch.bfloat16
    assert predict_main_memory(recipe, config).mapped > 0
    assert {base_config(name).dtype for name in BASES} == {torch.bfloat16}
