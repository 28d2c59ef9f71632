"""The front door for a notebook: the same core as the stages, without DVC."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from tvaprune.options.masks import MaskRequest
from tvaprune.pruning import _window_tokens, prune_directory

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
        ({"windows": 0}, "windows = 0: must be at least 1"),
        ({"texts": TEXTS[0]}, "found one str; pass [text]"),
        ({"texts": [*TEXTS, None]}, "texts: number 30 is of type NoneType, not str"),
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


def test_half_a_surrogate_pair_in_a_text_is_replaced(tokenizer) -> None:
    texts = [f"{text} \ud83d" for text in TEXTS]
    assert tvaprune.prune(tiny_model("llama"), tokenizer, texts, sparsity=0.3, method="flap", windows=8)


def test_models_that_cannot_be_pruned_are_refused_before_the_learning(tokenizer, tmp_path: Path) -> None:
    def refused(model, error: type[Exception], message: str, tokenizer=tokenizer) -> None:
        with pytest.raises(error, match=message):
            tvaprune.prune(model, tokenizer, TEXTS, method="depth", windows=8, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    refused(broken, InputError, r"layers\.1\.mlp\.up_proj\.weight has a value that is not finite")
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    refused(adapted, UnsupportedModelError, "has an adapter; merge it first")
    quantised = tiny_model("llama")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(quantised, UnsupportedModelError, "weights are quantised; load it in bfloat16 or float32")
    endless = AutoTokenizer.from_pretrained(tmp_path / "dense", eos_token=None)
    refused(tiny_model("llama"), InputError, "no end-of-text token", endless)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_whose_head_is_not_its_embedding_is_refused(tokenizer, tmp_path: Path, same: bool) -> None:
    """As a LoRA that trained the head, merged into a tied model, leaves it."""
    dense = tmp_path / "tied"
    tiny_model("llama_tied").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    weights = load_file(dense / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"] = head if same else head + 1
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    if same:
        prune_directory(dense, TEXTS, tmp_path / "out", 0.3, "flap", 8)
        return
    with pytest.raises(InputError, match="tie_word_embeddings is true, but its last matrix is not its embedding"):
        prune_directory(dense, TEXTS, tmp_path / "out", 0.3, "flap", 8)


def test_a_place_that_cannot_be_written_is_found_before_the_learning(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tvaprune.pruning.find_masks", lambda *_: pytest.fail("learned for nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        tvaprune.prune(tiny_model("llama"), tokenizer, TEXTS, windows=8, out=tmp_path / "file" / "out")


def test_a_model_that_cannot_be_written_is_found_before_the_learning(tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tvaprune.pruning.find_masks", lambda *_: pytest.fail("learned for nothing"))
    model = tiny_model("llama")
    model.generation_config.temperature = 0.7  # transformers refuses to save it without do_sample
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        tvaprune.prune(model, tokenizer, TEXTS, windows=8, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, bfloat16_by_default])
@pytest.mark.parametrize(("method", "options"), [("tva", TvaOptions(steps=2, curvature_windows=2)), ("flap", None)])
def test_what_a_caller_has_set_for_all_of_torch_changes_nothing(tokenizer, mode: Any, method: str, options) -> None:
    arguments = {"sparsity": 0.3, "method": method, "options": options, "windows": 8}
    expected = tvaprune.prune(tiny_model("llama"), tokenizer, TEXTS, **arguments).state_dict()
    model = tiny_model("llama").requires_grad_(True)
    with mode():
        found = tvaprune.prune(model, tokenizer, TEXTS, **arguments).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changed", "options", "tokens"),
    [
        ({}, TvaOptions(), 512),
        ({"max_position_embeddings": 100}, TvaOptions(), 96),
        ({"max_position_embeddings": 100}, TvaOptions(curvature_tokens=None), 100),
        ({"max_position_embeddings": 20}, TvaOptions(), 20),
        ({"sliding_window": 48}, FlapOptions(), 48),
    ],
)
def test_windows_fit_the_model_in_whole_blocks(changed: dict, options, tokens: int) -> None:
    model = tiny_model("mistral", **({"max_position_embeddings": 512} | changed))
    assert _window_tokens(model, MaskRequest(options.method, options, 0.2)) == tokens


def test_a_write_that_fails_leaves_nothing_and_can_be_repeated(tokenizer, tmp_path: Path, monkeypatch) -> None:
    def full(self: Checkpoint, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "blocks", full)
        with pytest.raises(OSError, match="No space left"):
            prune_directory(tmp_path / "dense", TEXTS, tmp_path / "out", 0.3, "flap", 8)
    assert not (tmp_path / "out").exists()
    prune_directory(tmp_path / "dense", TEXTS, tmp_path / "out", 0.3, "flap", 8)
    assert not list((tmp_path / "out").glob(".unfinished*"))


def test_a_directory_with_files_is_left_as_it_is(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is there and not empty"):
        tvaprune.prune(tiny_model("llama"), tokenizer, TEXTS, windows=8, out=tmp_path)
    (tmp_path / "out" / ".unfinished-x").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"out/\.unfinished-x: a run that was killed left it there; remove it"):
        tvaprune.prune(tiny_model("llama"), tokenizer, TEXTS, windows=8, out=tmp_path / "out")


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
    with pytest.warns(UserWarning, match=r"no widths in multiples of \(32, 32\) meet sparsity = 0\.9; they stay"):
        small = tvaprune.prune(model, tokenizer, TEXTS, sparsity=0.9, **arguments)
    assert decoder_parameters(small) <= 0.1 * dense_decoder_parameters(Topology.of(model.config))
