"""Stock layouts load with transformers alone and compute what the masked model computes; files are streamed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny_models import FAMILIES, random_masks, random_mean_inputs, random_update, save_tiny_model, tiny_model
from tvaprune.architecture.parameter_counts import dense_decoder_parameters, kept_decoder_parameters
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.layouts import dense_tensors, plan
from tvaprune.checkpoint.loading import load
from tvaprune.checkpoint.tensor_files import Checkpoint, TensorInfo, write_checkpoint
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import project
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.choices import Layout
from tvaprune.proof.parity import compact_logits, compare, masked_dense_logits

PROMPTS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))


def adapted(topology: Topology, layout: str, sparsity: float = 0.4, seed: int = 3) -> Masks:
    masks = project(topology, random_masks(topology, seed).score, sparsity)
    return adapt(topology, masks, sparsity, "budget", 4, 8, layout=layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_stock_layouts_compute_what_the_masked_model_computes(family: str, layout: str, tmp_path: Path) -> None:
    dense = save_tiny_model(family, tmp_path / "dense")
    config = load_config(dense)
    topology = Topology.of(config)
    masks, update = adapted(topology, layout), random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    written = load_config(tmp_path / "out")
    assert written.model_type == config.model_type
    assert not list((tmp_path / "out").glob("*.py"))
    expected = masked_dense_logits(dense, masks, update, PROMPTS)
    parity = compare(expected, compact_logits(tmp_path / "out", PROMPTS))
    assert parity.max_rel_logit_diff < 1e-5
    assert parity.argmax_agreement == 1


def test_padding_stands_for_blocks_that_are_gone(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = random_masks(topology, seed=3, empty_layer=1)
    masks.keep["hidden"][:] = True
    update = random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "out", layout="padded")
    expected = masked_dense_logits(dense, masks, update, PROMPTS)
    assert compare(expected, compact_logits(tmp_path / "out", PROMPTS)).max_rel_logit_diff < 1e-5
    widest = masks.widths()["intermediate"].max()
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert weight.shape == (widest, topology.hidden)
    assert not weight.any()


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_stock_layouts_load_in_a_plain_process(layout: str, tmp_path: Path) -> None:
    dense = save_tiny_model("llama_tied", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = adapted(topology, layout), random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    torch.save(PROMPTS, tmp_path / "prompts.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("out").eval()
assert "tvaprune" not in sys.modules and type(model).__name__ == "LlamaForCausalLM"
with torch.no_grad():
    torch.save(model(torch.load("prompts.pt")).logits, "logits.pt")
"""
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    expected = masked_dense_logits(dense, masks, update, PROMPTS)
    assert compare(expected, torch.load(tmp_path / "logits.pt")).max_rel_logit_diff < 1e-5


@pytest.mark.parametrize("family", ["llama_scaled", "qwen3"])
def test_older_readers_find_the_rotary_parameters(family: str, tmp_path: Path) -> None:
    """transformers 4 reads rope_theta and rope_scaling alone; 4.57.1 gave the same logits, bit for bit (2026-11-29)."""
    dense = save_tiny_model(family, tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    compact(dense, adapted(topology, "padded"), WeightUpdate.none(topology), tmp_path / "out", "padded")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = {**written["rope_parameters"]}
    assert written["rope_theta"] == rope.pop("rope_theta")
    assert written.get("rope_scaling") == (rope if family == "llama_scaled" else None)


def test_flap_biases_fit_a_llama_config_and_no_other(tmp_path: Path) -> None:
    for family in ("llama", "mistral"):
        dense = save_tiny_model(family, tmp_path / family)
        topology = Topology.of(load_config(dense))
        masks = adapted(topology, "padded")
        update = WeightUpdate(random_update(topology, seed=4).scale, random_mean_inputs(topology))
        if family == "mistral":
            with pytest.raises(ValueError, match=r"does not support FLAP's biases; set learn_masks\.flap\.bias"):
                compact(dense, masks, update, tmp_path / "out", layout="padded")
            continue
        compact(dense, masks, update, tmp_path / "out", layout="padded")
        expected = masked_dense_logits(dense, masks, update, PROMPTS)
        assert compare(expected, compact_logits(tmp_path / "out", PROMPTS)).max_rel_logit_diff < 1e-5


def test_sizes_that_the_config_refuses_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks = Masks.dense(topology)
    masks.keep["hidden"][0] = False
    with pytest.raises(ValueError, match="hidden_size of 63 with 4 heads"):
        compact(dense, masks, WeightUpdate.none(topology), tmp_path / "out", layout="padded")
    masks.keep["intermediate"][1, 5:] = False
    with pytest.raises(ValueError, match=r"compact\.layout = uniform, but the masks keep 5 to 96 of intermediate"):
        compact(dense, masks, WeightUpdate.none(topology), tmp_path / "out", layout="uniform")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["uneven", "uniform", "padded"])
def test_the_plan_from_a_config_alone_is_what_is_written(family: str, layout: str, tmp_path: Path) -> None:
    """So that an 8B run can be checked on the meta device first."""
    dense = save_tiny_model(family, tmp_path / "dense")
    config = load_config(dense)
    topology = Topology.of(config)
    masks = adapted(topology, layout, seed=8)
    update = random_update(topology, seed=4)
    planned = plan(config, dense_tensors(config), masks, update, layout)  # type: ignore[arg-type]
    size = compact(dense, masks, update, tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    assert Checkpoint.of(tmp_path / "out").info == planned.tensors
    assert load(tmp_path / "out").num_parameters() == size.parameters_kept
    in_layers = sum(info.numel for name, info in planned.tensors.items() if ".layers." in name)
    if layout != "padded":
        assert in_layers == kept_decoder_parameters(topology, masks.keep)


@pytest.mark.parametrize("family", FAMILIES)
@given(sparsity=st.floats(0.05, 0.7), seed=st.integers(0, 99))
def test_uniform_widths_meet_the_budget_and_the_config(family: str, sparsity: float, seed: int) -> None:
    shape = {"layers": 3, "hidden": 64, "intermediate": 96, "head_dim": 16}
    kv_heads = {"llama_mha": 4, "llama_mqa": 1}.get(family, 2)
    topology = Topology(
        **shape, kv_heads=kv_heads, group_size=4 // kv_heads, heads_divide_hidden=family.startswith("llama")
    )
    masks = project(topology, random_masks(topology, seed).score, sparsity)
    after = adapt(topology, masks, sparsity, "budget", 4, 8, layout="uniform")
    widths = after.widths()
    hidden, kept = int(widths["hidden"]), widths["kv_heads"]
    assert len(set(kept.tolist())) == len(set(widths["intermediate"].tolist())) == 1
    assert hidden % topology.hidden_divisor(int(kept[0])) == 0
    budget = (1 - sparsity) * dense_decoder_parameters(topology)
    assert kept_decoder_parameters(topology, after.keep) <= budget


def test_an_axis_that_the_masks_left_whole_stays_whole() -> None:
    topology = Topology(layers=3, hidden=64, intermediate=96, kv_heads=2, group_size=2, head_dim=16)
    masks = project(topology, random_masks(topology, 4).score, 0.3, axes=("intermediate",))
    widths = adapt(topology, masks, 0.3, "budget", 4, 8, layout="uniform").widths()
    assert int(widths["hidden"]) == 64
    assert widths["kv_heads"].tolist() == [2, 2, 2]


def test_nearest_uniform_widths_are_the_layers_means_rounded() -> None:
    topology = Topology(layers=3, hidden=64, intermediate=96, kv_heads=2, group_size=2, head_dim=16)
    masks = random_masks(topology, 4)
    widths = adapt(topology, masks, 0.3, "nearest", 4, 8, layout="uniform").widths()
    mean = float(masks.keep["intermediate"].sum(-1).float().mean())
    assert abs(int(widths["intermediate"][0]) - mean) <= 4.5
    assert len(set(widths["intermediate"].tolist())) == 1


@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    limit=st.integers(1, 2000),
    block=st.integers(1, 500),
)
def test_streamed_files_hold_what_was_written(
    shapes: list[tuple[int, int]], dtype: torch.dtype, limit: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("files")
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    described = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    source = Checkpoint.of(directory)
    out = directory / "out"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvaprune.checkpoint.tensor_files._BLOCK_BYTES", block)
        patch.setattr("tvaprune.checkpoint.tensor_files.SHARD_BYTES", limit)
        write_checkpoint(out, described, lambda name: (rows for _, rows in source.blocks(name)), "write")
    found = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    for shard in out.glob("*.safetensors"):
        inside = list(load_file(shard).values())
        assert len(inside) == 1 or sum(tensor.nbytes for tensor in inside) <= limit
    assert (len(list(out.glob("*.safetensors"))) > 1) == (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
@pytest.mark.parametrize("layout", ["uneven", "padded"])
@pytest.mark.parametrize("block", [1, 3000])  # a row, and some rows of a matrix
def test_a_checkpoint_cut_in_blocks_is_that_cut_in_one_piece(
    family: str, layout: Layout, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an 8B model is: no matrix of a tiny one fills a block."""
    dense = save_tiny_model(family, tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = adapted(topology, layout, seed=8), random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "whole", layout=layout)
    monkeypatch.setattr("tvaprune.checkpoint.tensor_files._BLOCK_BYTES", block)
    compact(dense, masks, update, tmp_path / "blocks", layout=layout)
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(blocks[name], tensor) for name, tensor in whole.items())


def test_rotary_frequencies_of_old_checkpoints_are_left_out() -> None:
    config = tiny_model("llama").config
    topology, dense = Topology.of(config), dense_tensors(config)
    old = dense | {"model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo((8,), torch.float32)}
    masks, update = random_masks(topology, seed=8), random_update(topology, seed=4)
    assert plan(config, old, masks, update).tensors == plan(config, dense, masks, update).tensors


def test_a_checkpoint_in_shards_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_tiny_model("llama", tmp_path / "dense")
    topology = Topology.of(load_config(dense))
    masks, update = adapted(topology, "uneven"), random_update(topology, seed=4)
    compact(dense, masks, update, tmp_path / "one")
    monkeypatch.setattr("tvaprune.checkpoint.tensor_files.SHARD_BYTES", 20_000)
    compact(dense, masks, update, tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    torch.testing.assert_close(compact_logits(tmp_path / "many", PROMPTS), compact_logits(tmp_path / "one", PROMPTS))


def test_a_tensor_that_was_announced_has_to_come(tmp_path: Path) -> None:
    described = {"a": TensorInfo((2, 2), torch.float32)}
    for rows, came in ((1, 8), (3, 24)):
        with pytest.raises(ValueError, match=f"tensor 'a': {came} bytes came, 16 were announced"):
            write_checkpoint(tmp_path, described, lambda _, rows=rows: [torch.zeros(rows, 2)], "write")


def test_a_damaged_or_quantised_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        Checkpoint.of(tmp_path)
    save_file({"w": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: w is stored as I8"):
        Checkpoint.of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        Checkpoint.of(tmp_path)
