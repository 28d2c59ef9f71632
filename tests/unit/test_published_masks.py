"""The authors' masks give the published counts, and no pickle gets to run anything."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoConfig, PreTrainedConfig
from typer.testing import CliRunner

from stages import adapt_dimensions
from tests.tiny_models import random_masks, random_update, tiny_model, write_published
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.layouts import dense_tensors, plan
from tvaprune.masks.adapt import adapt
from tvaprune.masks.masks import IMPORTED, read_masks, write_masks
from tvaprune.masks.projection import project
from tvaprune.masks.published import PublishedMasksError, read_published_masks
from tvaprune.masks.update import read_update
from tvaprune.options.axes import AXES
from tvaprune.options.choices import Layout

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = REPOSITORY.parent / "shared" / "data" / "tvaprune-mistral-mask.pkl"
published = pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the authors' mask file {PUBLISHED.name} is not here")
TINY = tiny_model("llama")
TOPOLOGY = Topology.of(TINY.config)


def mistral() -> PreTrainedConfig:
    """Mistral-7B-v0.1's sizes."""
    return AutoConfig.for_model(
        "mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip


def test_masks_in_the_published_form_are_read_as_write_published(tmp_path: Path) -> None:
    masks, update = random_masks(TOPOLOGY, seed=1), random_update(TOPOLOGY, seed=2)
    read, means = read_published_masks(write_published(tmp_path / "masks.pkl", masks, update), TOPOLOGY)
    for axis in AXES:
        assert torch.equal(means.scale[axis], update.scale[axis])
        assert torch.equal(read.keep[axis], masks.score[axis] > 0)
        torch.testing.assert_close(read.score[axis], masks.score[axis], rtol=1e-4, atol=1e-4)


def test_masks_of_another_model_are_refused(tmp_path: Path) -> None:
    file = write_published(tmp_path / "masks.pkl", random_masks(TOPOLOGY, seed=1), random_update(TOPOLOGY, seed=2))
    deeper = Topology.of(tiny_model("llama", layers=4).config)
    with pytest.raises(PublishedMasksError, match=r"inter_layer3_z_mu is absent, but the model needs \[96\]"):
        read_published_masks(file, deeper)
    with pytest.raises(PublishedMasksError, match="has inter_layer2_z_mu, but the model has 2 layers only"):
        read_published_masks(file, Topology.of(tiny_model("llama", layers=2).config))
    with pytest.raises(PublishedMasksError, match=r"attn_layer0_z_mu is of shape \[2\], but the model needs \[1\]"):
        read_published_masks(file, Topology.of(tiny_model("llama_mqa").config))


class Calls:
    """Pickles as a call: what a reader that executes would run."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def nested(evil: Calls) -> Calls:
    """The call inside of what should be a tensor's bytes."""
    from io import BytesIO

    stream = BytesIO()
    torch.save({"storage": evil}, stream)
    return Calls(torch.storage._load_from_bytes, stream.getvalue())


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda mark: Calls(os.system, f"touch {mark}"), r"posix\.system"),
        (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), r"builtins\.eval"),
        (lambda mark: {"hidden_mask_z_mu": Calls(os.mkdir, str(mark))}, r"posix\.mkdir"),
        (lambda mark: nested(Calls(os.mkdir, str(mark))), r"posix\.mkdir"),
        (lambda mark: Calls(Path.touch, mark), r"asks for (builtins\.getattr|pathlib)"),
        (lambda mark: ["a", 1], "holds list"),
        (lambda mark: {"hidden_mask_z_mu": "text"}, "not a dict of tensors"),
    ],
)
def test_nothing_in_a_pickle_is_run(evil: Callable[[Path], Any], named: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "masks.pkl"
    file.write_bytes(pickle.dumps(evil(mark), protocol=4))
    with pytest.raises(PublishedMasksError, match=named) as refused:
        read_published_masks(file, TOPOLOGY)
    assert "masks.pkl" in str(refused.value)
    assert not mark.exists()


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    file = write_published(tmp_path / "masks.pkl", random_masks(TOPOLOGY, seed=1), random_update(TOPOLOGY, seed=2))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PublishedMasksError, match=r"masks\.pkl: not a pickle of tensors, or damaged"):
        read_published_masks(file, TOPOLOGY)


def test_the_command_writes_an_artifact_that_stages_read(tmp_path: Path) -> None:
    from tvaprune.commands import app

    TINY.config.save_pretrained(tmp_path / "model")
    file = write_published(tmp_path / "masks.pkl", random_masks(TOPOLOGY, seed=1), random_update(TOPOLOGY, seed=2))
    arguments = ["import-masks", str(file), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "masks")]
    arguments += ["--means", str(tmp_path / "means")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    masks = read_masks(tmp_path / "masks", TOPOLOGY)
    assert f"hidden {int(masks.keep['hidden'].sum())} of 64" in shown.output
    expected, read = random_update(TOPOLOGY, seed=2).scale, read_update(tmp_path / "means", TOPOLOGY).scale
    assert all(torch.equal(read[axis], expected[axis]) for axis in AXES)


@pytest.mark.parametrize(("imported", "target", "removed"), [(True, 0.5, 0.5), (False, 0.2, 0.35)])
def test_imported_masks_keep_their_own_sparsity(imported: bool, target: float, removed: float, tmp_path: Path) -> None:
    """Not that of params.yaml, which would bring back units that the authors dropped."""
    TINY.config.save_pretrained(tmp_path / "model")
    params = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    params |= {"sparsity": 0.2}
    params["adapt_dimensions"] |= {"multiple": {"hidden": 16, "intermediate": 16}}
    YAML(typ="safe").dump(params, tmp_path / "params.yaml")
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, seed=1).score, 0.5, AXES)
    made_with = {IMPORTED: {}} if imported else {}
    write_masks(tmp_path / "masks", masks, made_with=made_with, validation_ppl={})
    (tmp_path / "profile").mkdir()
    paths = (tmp_path / name for name in ("model", "masks", "profile", "adapted", "adapt.json", "params.yaml"))
    adapt_dimensions.main(*paths)
    adapted = sparsity(TOPOLOGY, read_masks(tmp_path / "adapted", TOPOLOGY).widths())
    assert adapted == pytest.approx(removed, abs=0.03)
    assert json.loads((tmp_path / "adapt.json").read_text())["target_sparsity"] == pytest.approx(target, abs=0.01)


@published
def test_the_published_counts_come_out() -> None:
    topology = Topology.of(mistral())
    masks, _ = read_published_masks(PUBLISHED, topology)
    widths = masks.widths()
    assert int(widths["hidden"]) == 3171
    assert widths["kv_heads"][7] == 7
    assert widths["kv_heads"][22] == 2
    assert sparsity(topology, masks.widths()) == pytest.approx(0.512, abs=5e-4)
    adapted = adapt(topology, masks, 0.5, "nearest", 128, 128)
    assert int(adapted.widths()["hidden"]) == 3200
    assert sparsity(topology, adapted.widths()) == pytest.approx(0.507, abs=5e-4)


@published
@pytest.mark.parametrize("layout", ["uneven", "padded"])
def test_the_published_masks_can_be_compacted(layout: Layout) -> None:
    config = mistral()
    topology = Topology.of(config)
    published_masks, update = read_published_masks(PUBLISHED, topology)
    masks = adapt(topology, published_masks, 0.5, "nearest", 128, 128, layout=layout)
    planned = plan(config, dense_tensors(config), masks, update, layout)
    shapes = {name: info.shape for name, info in planned.tensors.items()}
    heads = 7 if layout == "uneven" else int(masks.widths()["kv_heads"].max())
    assert shapes["model.layers.7.self_attn.q_proj.weight"] == (heads * 4 * 128, 3200)
    assert shapes["model.layers.7.self_attn.k_proj.weight"] == (heads * 128, 3200)
    units = masks.widths()["intermediate"]
    assert shapes["model.layers.7.mlp.down_proj.weight"] == (3200, int(units[7] if layout == "uneven" else units.max()))
    assert not (units % 128).any()
    assert shapes["lm_head.weight"] == (32000, 3200)
