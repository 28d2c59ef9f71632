"""A packed model computes what the plain one does, with fewer and other operations."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.test_latency import build_pruned
from tvaprune.model.runtime import PackedAttention, PackedLinear, PackedMLP, PackedNorm, pick_runtime, prepare

PROMPT = torch.randint(128, (2, 13), generator=torch.Generator().manual_seed(3))


def relative_difference(model: PreTrainedModel, packed: PreTrainedModel, **inputs: torch.Tensor) -> float:
    with torch.inference_mode():
        plain, other = model(PROMPT, **inputs).logits.float(), packed(PROMPT, **inputs).logits.float()
    return ((plain - other).norm() / plain.norm()).item()


def make(family: str) -> PreTrainedModel:
    return build_pruned() if family == "pruned" else tiny_model(family)


@pytest.mark.parametrize("family", [*FAMILIES, "pruned"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_packed_logits_are_the_plain_ones(family: str, dtype: torch.dtype, bound: float) -> None:
    model = make(family).to(dtype)
    packed = prepare(copy.deepcopy(model), "packed")
    assert relative_difference(model, packed) <= bound
    padded = torch.ones_like(PROMPT)
    padded[0, :4] = 0
    assert relative_difference(model, packed, attention_mask=padded) <= bound
    # The bounds can fail: one scaled norm shows.
    packed.model.norm.weight = torch.nn.Parameter(packed.model.norm.weight * 1.1)
    assert relative_difference(model, packed) > bound


@pytest.mark.parametrize("family", [*FAMILIES, "pruned"])
def test_packed_generation_is_the_plain_one(family: str) -> None:
    """With a cache, one token at a time: the rows of a group stacked."""
    model = make(family)
    packed = prepare(copy.deepcopy(model), "packed")
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": torch.ones_like(PROMPT),
        "eos_token_id": None,
    }
    assert packed.generate(PROMPT, **options).tolist() == model.generate(PROMPT, **options).tolist()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_norm_of_one_token_is_that_of_many(dtype: torch.dtype, bound: float) -> None:
    norm = PackedNorm(tiny_model("llama").to(dtype).model.norm)
    # Far from zero mean, and so small that eps counts.
    inputs = (torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)) + 2).to(dtype)
    inputs[0] *= 1e-3
    many, one = norm(inputs), torch.cat([norm(inputs[:, index : index + 1]) for index in range(3)], dim=1)
    torch.testing.assert_close(one, many, rtol=bound, atol=bound)


def test_every_product_is_packed() -> None:
    packed = prepare(tiny_model("llama"), "packed")
    kinds = [type(module) for module in packed.modules()]
    assert (kinds.count(PackedAttention), kinds.count(PackedMLP), kinds.count(PackedLinear)) == (3, 3, 3 * 4 + 1)
    assert torch.nn.Linear not in kinds


def test_eager_changes_nothing_and_auto_is_packed_on_a_cpu() -> None:
    model = tiny_model("llama")
    kinds = [type(module) for module in model.modules()]
    assert prepare(model, "eager") is model
    assert [type(module) for module in model.modules()] == kinds
    assert pick_runtime("auto", torch.device("cpu")) == "packed"
    assert pick_runtime("auto", torch.device("cuda")) == "eager"
    assert pick_runtime("compile", torch.device("cpu")) == "compile"


def test_packed_refuses_what_it_has_no_kernels_for() -> None:
    with pytest.raises(ValueError, match="float16"):
        prepare(tiny_model("llama").to(torch.float16), "packed")
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        prepare(model, "packed")
