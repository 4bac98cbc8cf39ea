"""Linear layers in oneDNN's layout compute what they computed before."""

from __future__ import annotations

import pytest
import torch
from golden_models import NAMES, golden
from torch import nn

from vlaft.model.generation import generate_action_ids
from vlaft.model.packed_linear import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="needs oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 37), (3, 1, 37), (2, 50, 37), (0, 37)])
def test_products(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    if not can_pack(dtype):
        pytest.skip("this CPU has no kernels for the type")
    torch.manual_seed(0)
    linear = nn.Linear(37, 53, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        found, expected = PackedLinear(linear)(x), linear(x)
    assert found.dtype == dtype and found.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_model_decodes_the_golden_tokens(name: str) -> None:
    case = golden(name)
    model = case.load()
    before = sum(type(module) is nn.Linear for module in model.modules())
    pack_linears(model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == before - 1  # all but the head
    length = case.expected["prompt_lengths"][0]
    ids = generate_action_ids(
        model, case.tensors["input_ids"][:1, :length], case.tensors["pixel_values"][:1], num_tokens=7
    )
    assert ids.tolist() == case.expected["generated"][:1]


def test_types_without_kernels_stay_plain() -> None:
    model = nn.Sequential(nn.Linear(4, 4).to(torch.float64), nn.Linear(4, 4))
    pack_linears(model)
    assert [type(module) for module in model] == [nn.Linear, PackedLinear]
