"""The front door for a notebook: the same core as the stages, without DVC."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tvaprune
from tests.tiny_models import tiny_model, tiny_tokenizer
from tvaprune.architecture.parameter_counts import dense_decoder_parameters
from tvaprune.architecture.topology import Topology, UnsupportedModelError
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.inputs.sources import InputError
from tvaprune.options.baselines import FlapOptions, RandomOptions
from tvaprune.options.gates import GraspruneOptions, TvaOptions
from tvaprune.pruning import prune_directory

TEXTS = [
    f"The bank's engineer number {number} thinks that they will pay {number * 7} of it. " * 12 for number in range(30)
]


@pytest.fixture
def tokenizer(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer(tmp_path / "dense")
    return AutoTokenizer.from_pretrained(tmp_path / "dense")


def decoder_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tva", TvaOptions(steps=4, curvature_windows=2)),
        ("grasprune", GraspruneOptions(3, 3)),
        ("flap", None),
        ("osscar", None),
    ],
)
def test_a_pruned_model_is_smaller_generates_and_reloads(tokenizer, tmp_path: Path, method: str, options) -> None:
    model = tiny_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokenizer(TEXTS[0][:100], return_tensors="pt").input_ids
    logits = model(ids).logits
    pruned = tvaprune.prune(
        model, tokenizer, TEXTS, sparsity=0.3, method=method, options=options, windows=8, out=tmp_path / "pruned"
    )
    dense = dense_decoder_parameters(Topology.of(model.config))
    assert 0.6 * dense < decoder_parameters(pruned) <= 0.7 * dense + 2 * 64 * 3  # FLAP adds biases
    assert pruned.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
    assert torch.equal(tvaprune.load(tmp_path / "pruned")(ids).logits, pruned(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").vocab_size == tokenizer.vocab_size
    assert torch.equal(model(ids).logits, logits), "the dense model was changed"
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sparsity": 1.5}, "sparsity = 1.5"),
        ({"method": "wanda"}, "learn_masks.method = 'wanda': use one of tva, paper"),
        ({"windows": 10**6}, "texts"),
        ({"texts": TEXTS[0]}, "found one str; pass [text]"),
        ({"options": FlapOptions()}, "'tva' takes TvaOptions, found FlapOptions"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tokenizer, arguments: dict, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(named)):
        tvaprune.prune(tiny_model("llama"), tokenizer, **{"texts": TEXTS, "windows": 8, **arguments})


@pytest.mark.parametrize(
    ("kind", "option", "value"), [(TvaOptions, "steps", 0), (FlapOptions, "windows", 0.5), (FlapOptions, "window", 8)]
)
def test_options_are_checked_where_they_are_made(kind: type, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\n{option}\n"):
        kind(**{option: value})


def test_a_directory_is_cut_in_its_own_dtype_and_not_cut_again(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TVAPRUNE_DTYPE", "float32")
    dense, out = tmp_path / "stored", tmp_path / "out"
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    size = prune_directory(dense, TEXTS, out, 0.3, "flap", 8)
    pruned = tvaprune.load(out)
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}
    assert size.parameters_kept == pruned.num_parameters() < size.parameters_dense == model.num_parameters()
    assert (out / "tokenizer.json").is_file()
    with pytest.raises(UnsupportedModelError, match="is pruned already: prune the dense one"):
        prune_directory(out, TEXTS, tmp_path / "again", 0.3, "flap", 8)
    with pytest.raises(FileNotFoundError, match="absent"):
        prune_directory(tmp_path / "absent", TEXTS, tmp_path / "again")


def test_a_directory_with_files_is_left_as_it_is(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there and not empty"):
        tvaprune.prune(tiny_model("llama"), tokenizer, TEXTS, windows=8, out=tmp_path)


def test_a_second_copy_of_the_weights_is_not_read_and_a_missing_tensor_is_seen_first(tokenizer, tmp_path: Path) -> None:
    """A hub's snapshot can hold the same weights under other names, as consolidated.safetensors."""
    dense = tmp_path / "dense"
    save_file({"layers.0.attention.wk.weight": torch.zeros(2, 2)}, dense / "consolidated.safetensors")
    assert "layers.0.attention.wk.weight" not in Checkpoint.of(dense).info
    weights = load_file(dense / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        prune_directory(dense, ["never read"], tmp_path / "out")


@pytest.mark.filterwarnings("default")
def test_where_no_multiples_meet_the_target_the_learned_widths_stay(tokenizer) -> None:
    model = tiny_model("llama")
    arguments = {"method": "random", "options": RandomOptions(0, 0), "windows": 4}
    with pytest.warns(UserWarning, match="the widths are no multiples of .*exceeds the budget"):
        small = tvaprune.prune(model, tokenizer, TEXTS, sparsity=0.9, **arguments)
    assert decoder_parameters(small) <= 0.1 * dense_decoder_parameters(Topology.of(model.config))
