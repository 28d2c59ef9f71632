"""masked = compact = reloaded, for every family."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_models import FAMILIES, random_masks, random_mean_inputs, random_update, save_tiny_model
from tvaprune.architecture.parameter_counts import kept_decoder_parameters, shared_parameters
from tvaprune.architecture.topology import Topology, reader_shapes
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.fold import can_stay_tied
from tvaprune.checkpoint.loading import load
from tvaprune.gates.insertion import GatedModel, hard_gates
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.proof.checks import against_gates
from tvaprune.proof.parity import compact_logits, compare, gated_logits, masked_dense_logits

PROMPTS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty_layer", [None, 0, 1])
def test_masked_equals_compact_equals_gates_in_place(family: str, empty_layer: int | None, tmp_path: Path) -> None:
    dense = save_tiny_model(family, tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = random_masks(topology, seed=3, empty_layer=empty_layer)
    update = random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "compact")
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)

    folded = compare(masked_dense_logits(dense, masks, update, PROMPTS), reloaded)
    model = load(dense)
    with GatedModel(model, topology).inserted() as gated, torch.no_grad():
        kept = int(masks.keep["hidden"].sum())
        gated.set(hard_gates(masks.keep, update.scale), kept, channel_means=update.channel_scale)
        in_place = compare(model(PROMPTS).logits, reloaded)

    for parity in (folded, in_place):
        assert parity.max_rel_logit_diff < 1e-5
        assert parity.argmax_agreement == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_sees_what_the_fold_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """Gates over unfolded weights against the compact model: passed as it is, failed where one site is not folded."""
    dense = save_tiny_model("llama_tied", tmp_path / "dense", dtype)
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=3), random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "compact")
    logits = compact_logits(tmp_path / "compact", PROMPTS)
    assert against_gates(gated_logits(dense, masks, update, PROMPTS), logits, dtype).passed
    squared = {axis: scale.square() if axis == "hidden" else scale for axis, scale in update.scale.items()}
    other = gated_logits(dense, masks, replace(update, scale=squared), PROMPTS)
    assert against_gates(other, logits, torch.float32).passed is False


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_the_checkpoints(family: str, tmp_path: Path) -> None:
    dense = save_tiny_model(family, tmp_path / "dense")
    config = load_config(dense)
    topology = Topology.of(config)
    masks = random_masks(topology, seed=5, empty_layer=2)
    size = compact(dense, masks, random_update(topology, seed=6), tmp_path / "compact")
    counted = kept_decoder_parameters(topology, masks.keep)
    outside = shared_parameters(
        topology, int(masks.keep["hidden"].sum()), config.vocab_size, config.tie_word_embeddings
    )
    assert size.parameters_kept == counted + outside
    assert sum(p.numel() for p in load(tmp_path / "compact").parameters()) == size.parameters_kept


@pytest.mark.parametrize("empty_layer", [None, 0])
@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "qwen3"])
def test_generation_with_cache_equals_without(family: str, empty_layer: int | None, tmp_path: Path) -> None:
    dense = save_tiny_model(family, tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = random_masks(topology, seed=7, empty_layer=empty_layer)
    compact(dense, masks, WeightUpdate.none(topology), tmp_path / "compact")
    model = load(tmp_path / "compact")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(PROMPTS, use_cache=True, **settings)
    assert cached.shape == (2, 29)
    torch.testing.assert_close(cached, model.generate(PROMPTS, use_cache=False, **settings))


def test_the_directory_loads_with_transformers_alone(tmp_path: Path) -> None:
    dense = save_tiny_model("llama_tied", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=9, empty_layer=0), random_update(topology, seed=10)
    compact(dense, masks, update, tmp_path / "compact")
    moved = (tmp_path / "compact").rename(tmp_path / "elsewhere")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(moved)!r}, trust_remote_code=True).eval()
assert "tvaprune" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load({str(tmp_path / "prompts.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    torch.save(PROMPTS, tmp_path / "prompts.pt")
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    expected = masked_dense_logits(dense, masks, update, PROMPTS)
    assert compare(expected, torch.load(tmp_path / "logits.pt")).max_rel_logit_diff < 1e-5


def test_bfloat16_checkpoint_is_cut_without_further_loss(tmp_path: Path) -> None:
    dense = save_tiny_model("llama_tied", tmp_path / "dense", torch.bfloat16)
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=11), random_update(topology, seed=12)
    compact(dense, masks, update, tmp_path / "compact")
    assert load(tmp_path / "compact").dtype == torch.bfloat16
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)
    assert compare(masked_dense_logits(dense, masks, update, PROMPTS), reloaded).max_abs_logit_diff < 1e-3


def test_a_dropped_dimension_with_a_mean_of_zero_is_no_fault(tmp_path: Path) -> None:
    """Its inverse in the final norm of tied embeddings would be infinite, and infinity times 0 is not a number."""
    dense = save_tiny_model("llama_tied", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=13), random_update(topology, seed=14)
    assert not masks.keep["hidden"].all()
    update.scale["hidden"][~masks.keep["hidden"]] = 0.0
    compact(dense, masks, update, tmp_path / "compact")
    assert can_stay_tied(masks, update)
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)
    assert compare(masked_dense_logits(dense, masks, update, PROMPTS), reloaded).max_rel_logit_diff < 1e-5
    assert compare(gated_logits(dense, masks, update, PROMPTS), reloaded).max_rel_logit_diff < 1e-5


def test_a_mean_of_zero_unties_the_embeddings(tmp_path: Path) -> None:
    dense = save_tiny_model("llama_tied", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=13), random_update(topology, seed=14)
    update.scale["hidden"][0] = 0.0
    assert not can_stay_tied(masks, update)
    compact(dense, masks, update, tmp_path / "compact")
    assert json.loads((tmp_path / "compact" / "config.json").read_text())["tie_word_embeddings"] is False
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)
    assert compare(masked_dense_logits(dense, masks, update, PROMPTS), reloaded).max_rel_logit_diff < 1e-5


def test_flap_biases_are_added_to_the_projections(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = random_masks(topology, seed=15, empty_layer=1)
    update = WeightUpdate(random_update(topology, seed=16).scale, random_mean_inputs(topology))
    compact(dense, masks, update, tmp_path / "compact")
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)
    assert compare(masked_dense_logits(dense, masks, update, PROMPTS), reloaded).max_rel_logit_diff < 1e-5
    without = WeightUpdate(update.scale)
    assert compare(masked_dense_logits(dense, masks, without, PROMPTS), reloaded).max_rel_logit_diff > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_new_matrices_are_scaled_and_cut_in_place_of_the_dense_ones(family: str, tmp_path: Path) -> None:
    dense = save_tiny_model(family, tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = random_masks(topology, seed=18, empty_layer=1), random_update(topology, seed=19)
    update.weight.update({name: 0.2 * torch.randn(shape) for name, shape in reader_shapes(topology).items()})
    compact(dense, masks, update, tmp_path / "compact")
    reloaded = compact_logits(tmp_path / "compact", PROMPTS)
    for logits in (masked_dense_logits, gated_logits):
        assert compare(logits(dense, masks, update, PROMPTS), reloaded).max_rel_logit_diff < 1e-4
        without = replace(update, weight={})
        assert compare(logits(dense, masks, without, PROMPTS), reloaded).max_rel_logit_diff > 1e-2


def test_a_mask_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = Masks.dense(topology)
    masks.keep["hidden"][:] = False
    with pytest.raises(ValueError, match="no hidden dimension"):
        compact(dense, masks, WeightUpdate.none(topology), tmp_path / "compact")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_changed(implementation: str, tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = random_masks(topology, seed=17)
    compact(dense, masks, WeightUpdate.none(topology), tmp_path / "compact")
    model = load(tmp_path / "compact")
    expected = model(PROMPTS).logits
    model.set_attn_implementation(implementation)
    attention = model.get_submodule("model.layers.0.self_attn")
    assert attention.config._attn_implementation == implementation
    torch.testing.assert_close(model(PROMPTS).logits, expected, rtol=1e-4, atol=1e-4)


def test_of_other_files_only_those_of_the_tokenizer_and_the_licence_are_copied(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    kept = {"tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"}
    left = {".git/lfs/weights", "onnx/model.onnx", "flax_model.msgpack", "pytorch_model.bin", "optimizer.pt", "run.py"}
    for name in kept | left:
        (dense / name).parent.mkdir(parents=True, exist_ok=True)
        (dense / name).write_text("{}")
    topology, out = Topology.of(load_config(dense)), tmp_path / "out"
    compact(dense, Masks.dense(topology), WeightUpdate.none(topology), out)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert kept <= written
    assert not left & written
