"""A packed model computes what the plain one does, with fewer and other operations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.test_latency import build_pruned
from tvaprune.runtime.packed import PackedAttention, PackedLinear, PackedMLP, PackedNorm, pick_runtime, prepare

PROMPT = torch.randint(128, (2, 13), generator=torch.Generator().manual_seed(3))


def relative_difference(model: PreTrainedModel, packed: PreTrainedModel, **inputs: torch.Tensor) -> float:
    with torch.inference_mode():
        plain, other = model(PROMPT, **inputs).logits.float(), packed(PROMPT, **inputs).logits.float()
    return ((plain - other).norm() / plain.norm()).item()


class CallCounter:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.function(**inputs)


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


@pytest.mark.parametrize("family", [*FAMILIES, "pruned"])
@pytest.mark.parametrize(
    ("dtype", "has_layout"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)]
)
def test_a_single_token_has_the_logits_of_the_whole_text(
    family: str, dtype: torch.dtype, has_layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No further than the plain model's from what the same weights give in float32.

    A bfloat16 reference would not do: its own rounding is as large as the difference. Over fewer texts the ratio of
    the two errors is noise (0.5 to 1.4 with two, 0.8 to 1.1 with these).
    """
    if not has_layout:  # as on a processor without AVX-512
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    texts = torch.randint(128, (32, 13), generator=torch.Generator().manual_seed(4))
    model = make(family).to(dtype)
    packed = prepare(copy.deepcopy(model), "packed")
    body = packed.model.forward
    body.stock = CallCounter(body.stock)
    with torch.inference_mode():
        plain = model(texts).logits[:, 8:]
        exact = copy.deepcopy(model).float()(texts).logits[:, 8:]
        cache = packed(texts[:, :8]).past_key_values
        positions = torch.arange(13)[None]
        single = [
            packed(texts[:, i : i + 1], past_key_values=cache, position_ids=positions[:, i : i + 1]).logits
            for i in range(8, 13)
        ]
    assert body.stock.calls == 1, "the prompt alone takes the stock forward"
    own, found = ((logits.float() - exact).norm() / exact.norm() for logits in (plain, torch.cat(single, dim=1)))
    assert found <= max(1e-4, 1.2 * own)
    assert cache.get_seq_length() == 13


def test_single_tokens_after_padding_or_without_a_cache_take_the_stock_forward() -> None:
    model = tiny_model("llama")
    packed = prepare(copy.deepcopy(model), "packed")
    body = packed.model.forward
    body.stock = CallCounter(body.stock)
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    found = []
    with torch.inference_mode():
        for each in (model, packed):
            cache = each(PROMPT[:, :12], attention_mask=mask[:, :12]).past_key_values
            found.append(each(PROMPT[:, 12:], attention_mask=mask, past_key_values=cache).logits)
            found.append(each(PROMPT[:, :1], use_cache=False).logits)
            cache = each(PROMPT[:, :12]).past_key_values
            hidden = each(PROMPT[:, 12:], past_key_values=cache, output_hidden_states=True).hidden_states
            found.append(torch.stack(hidden))
    assert body.stock.calls == 5
    for plain, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_norm_of_one_token_is_that_of_many(dtype: torch.dtype, bound: float) -> None:
    norm = PackedNorm(tiny_model("llama").to(dtype).model.norm)
    # Far from zero mean, and so small that eps counts.
    inputs = (torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)) + 2).to(dtype)
    inputs[0] *= 1e-3
    many, one = norm(inputs), torch.stack([norm(inputs[:, index]) for index in range(3)], dim=1)
    torch.testing.assert_close(one, many, rtol=bound, atol=bound)


def test_every_product_is_packed() -> None:
    packed = prepare(tiny_model("llama"), "packed")
    kinds = [type(module) for module in packed.modules()]
    assert (kinds.count(PackedAttention), kinds.count(PackedMLP), kinds.count(PackedLinear)) == (3, 3, 3 * 4 + 1)
    assert torch.nn.Linear not in kinds


def test_eager_changes_nothing_and_auto_is_what_suits_the_device() -> None:
    model = tiny_model("llama")
    kinds = [type(module) for module in model.modules()]
    assert prepare(model, "eager") is model
    assert [type(module) for module in model.modules()] == kinds
    assert pick_runtime("auto", torch.device("cpu")) == "packed"
    assert pick_runtime("auto", torch.device("cuda")) == "graphs"
    assert pick_runtime("compile", torch.device("cpu")) == "compile"
    with pytest.raises(ValueError, match="graphs: needs a CUDA device, not cpu"):
        pick_runtime("graphs", torch.device("cpu"))


def test_packed_refuses_what_it_has_no_kernels_for() -> None:
    with pytest.raises(ValueError, match="float16"):
        prepare(tiny_model("llama").to(torch.float16), "packed")
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="eager"):
        prepare(model, "packed")
