"""Sampling of calibration windows: what the property tests do not cover."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tvaprune.artifacts import read_artifact
from tvaprune.inputs.calibration import (
    TokenDocument,
    WindowSet,
    load_tokenizer,
    sample_calibration,
    sample_windows,
    share_out,
    tokenise,
    tokenizer_identity,
)
from tvaprune.inputs.documents import Document, write_documents
from tvaprune.inputs.sources import InputError

SETS = [
    WindowSet("input_ids", 6, 8),
    WindowSet("validation_ids", 2, 8),
    WindowSet("finetune_ids", 4, 16),
    WindowSet("finetune_validation_ids", 2, 16),
]
# The same sets as parameters.
SIZES = {
    "samples": 6,
    "seq_len": 8,
    "validation_samples": 2,
    "finetune_samples": 4,
    "finetune_seq_len": 16,
    "finetune_validation_samples": 2,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", *(f"w{number}" for number in range(50))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def make_documents(count: int, words: int) -> list[Document]:
    return [Document(f"d{n}", " ".join(f"w{(n + word) % 50}" for word in range(words))) for n in range(count)]


def document(tokens: int, name: str = "only") -> TokenDocument:
    return TokenDocument(name, np.arange(1, tokens + 1, dtype=np.int32))


def test_text_that_spells_the_end_token_does_not_become_it(tokenizer: PreTrainedTokenizerFast) -> None:
    (tokens,) = tokenise([Document("a", "w1 <eos> w2")], tokenizer, "texts")
    assert tokenizer.eos_token_id not in tokens.tokens
    assert len(tokens.tokens) == 3


def test_a_document_without_text_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    assert [one.id for one in tokenise([Document("a", ""), Document("b", "w1")], tokenizer, "texts")] == ["b"]


def test_too_little_text_says_how_many_windows_there_are() -> None:
    documents = [document(20, f"d{number}") for number in range(20)]
    with pytest.raises(
        InputError, match=r"train: 100 windows of 8 tokens are needed from 'books', which has text for 40"
    ):
        sample_windows(
            {"books": documents},
            [WindowSet("train", 100, 8)],
            packing="documents",
            eos_token_id=0,
            seed=0,
        )


def test_one_long_document_gives_all_sets() -> None:
    sets = [WindowSet("train", 10, 8), WindowSet("validation", 4, 8)]
    windows = sample_windows({"book": [document(8 * 40)]}, sets, packing="auto", eos_token_id=0, seed=0)
    train, validation = (set(windows[name].flatten().tolist()) for name in ("train", "validation"))
    assert len(train) == 80
    assert not train & validation


def test_one_long_document_among_short_ones_gives_all_sets() -> None:
    """Whole, it would go to one set, and starve the others."""
    documents = [document(8000, "book"), *(document(20, f"note {number}") for number in range(30))]
    sets = [replace(one, samples=20 * one.samples) for one in SETS]
    windows = sample_windows({"texts": documents}, sets, packing="auto", eos_token_id=0, seed=0)
    assert {name: len(rows) for name, rows in windows.items()} == {one.name: one.samples for one in sets}


def test_windows_start_at_random_offsets() -> None:
    documents = [document(15, f"d{number}") for number in range(64)]
    windows = sample_windows({"a": documents}, [WindowSet("train", 64, 8)], packing="documents", eos_token_id=0, seed=0)
    assert set(windows["train"][:, 0].tolist()) == set(range(1, 9))


def test_documents_are_dealt_in_proportion_to_what_the_sets_need() -> None:
    """There is text for exactly as many windows as are needed."""
    documents = [document(8, f"d{number}") for number in range(40)]
    sets = [WindowSet("train", 30, 8), WindowSet("validation", 10, 8)]
    windows = sample_windows({"a": documents}, sets, packing="documents", eos_token_id=0, seed=0)
    assert {name: len(rows) for name, rows in windows.items()} == {"train": 30, "validation": 10}


def test_windows_are_drawn_from_all_documents_and_sources_in_random_order() -> None:
    sources = {
        name: [TokenDocument(f"{name}{n}", np.full(80, first + n, np.int32)) for n in range(20)]
        for name, first in (("a", 100), ("b", 200))
    }
    windows = sample_windows(sources, [WindowSet("train", 40, 8)], packing="documents", eos_token_id=0, seed=0)
    firsts = windows["train"][:, 0].tolist()
    assert all(len({token for token in firsts if token // 100 == source}) > 8 for source in (1, 2))
    of_source = [token // 100 for token in firsts]
    assert of_source not in (sorted(of_source), sorted(of_source, reverse=True))


def test_mix_weights_the_sources_and_refuses_unknown_ones() -> None:
    sources = {"a": [document(8, f"a{n}") for n in range(30)], "b": [document(8, f"b{n}") for n in range(30)]}
    for docs, start in zip(sources.values(), (0, 100), strict=True):
        for one in docs:
            one.tokens[:] += start
    sets = [WindowSet("train", 12, 8, {"a": 3}), WindowSet("other", 6, 8, {"a": 0})]
    windows = sample_windows(sources, sets, packing="auto", eos_token_id=0, seed=0)
    assert int((windows["train"][:, 0] < 100).sum()) == 9
    assert int((windows["other"][:, 0] < 100).sum()) == 0
    with pytest.raises(InputError, match="train: mix names c; the calibration sources are a, b"):
        WindowSet("train", 12, 8, {"c": 1}).shares(sources)
    with pytest.raises(InputError, match="train: mix gives every source the weight 0"):
        WindowSet("train", 12, 8, {"a": 0, "b": 0}).shares(sources)


def test_text_for_fine_tuning_alone_leaves_the_windows_for_masks_as_they_were(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A source of weight 0 in one mix and of 1 in the other, the other sources' windows as many as before."""
    documents = {"long": make_documents(40, 40), "more": make_documents(60, 20)}
    before, _ = sample_calibration({"long": documents["long"]}, tokenizer, SETS, packing="auto", seed=3)
    sets = [replace(one, mix={"more": 0}) for one in SETS[:2]]
    sets += [replace(one, samples=2 * one.samples) for one in SETS[2:]]
    after, meta = sample_calibration(documents, tokenizer, sets, packing="auto", seed=3)
    for name in ("input_ids", "validation_ids"):
        assert torch.equal(before[name], after[name])
        assert meta["windows"][name]["more"] == 0
    assert meta["windows"]["finetune_ids"] == {"long": 4, "more": 4}


def test_share_out_gives_the_rest_to_the_largest_remainders() -> None:
    assert share_out(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert share_out(5, {"a": 0.0, "b": 2.0}) == {"a": 0, "b": 5}


def test_meta_says_what_the_windows_come_from(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = {"long": make_documents(40, 40), "short": make_documents(60, 5)}
    windows, meta = sample_calibration(documents, tokenizer, SETS, packing="auto", seed=3)
    assert {name: tuple(rows.shape) for name, rows in windows.items()} == {
        "input_ids": (6, 8),
        "validation_ids": (2, 8),
        "finetune_ids": (4, 16),
        "finetune_validation_ids": (2, 16),
    }
    assert meta["sources"] == {"long": {"documents": 40, "tokens": 1600}, "short": {"documents": 60, "tokens": 300}}
    assert meta["windows"]["input_ids"] == {"long": 3, "short": 3}
    assert meta["seed"] == 3
    # only the packed short documents hold the end-of-text token
    assert int((windows["input_ids"] == tokenizer.eos_token_id).any(dim=1).sum()) == 3


def test_tokenizer_identity_tells_vocabularies_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_identity(tokenizer)
    tokenizer.add_tokens(["new"])
    assert tokenizer_identity(tokenizer)["vocabulary_sha256"] != before["vocabulary_sha256"]


def test_a_missing_tokenizer_is_not_asked_of_a_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer_config\.json; a model directory with its tokenizer"):
        load_tokenizer(tmp_path)


def test_the_stage_writes_the_same_bytes_twice(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from stages.sample_calibration import main

    app = typer.Typer()
    app.command()(main)
    texts = tmp_path / "texts"
    texts.mkdir()
    write_documents(texts / "a.jsonl", make_documents(60, 40))
    tokenizer.save_pretrained(tmp_path / "model")
    settings = "\n".join(f"  {name}: {value}" for name, value in SIZES.items())
    params = tmp_path / "params.yaml"
    params.write_text(f"seed: 1\nsample_calibration:\n{settings}\n  packing: auto\n  mix: {{}}\n  finetune_mix: null\n")
    options = ["--params", str(params), "--texts", str(texts), "--model", str(tmp_path / "model"), "--out"]
    for name in ("one", "two"):
        result = CliRunner().invoke(app, [*options, str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    for file in ("tensors.safetensors", "meta.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    tensors, _ = read_artifact(tmp_path / "one", "calibration")
    assert {name: tuple(rows.shape) for name, rows in tensors.items()} == {
        one.name: (one.samples, one.seq_len) for one in SETS
    }
    assert tensors["finetune_ids"].dtype == torch.int32

    params.write_text(params.read_text().replace("samples: 6", "samples: 60000"))
    result = CliRunner().invoke(app, [*options, str(tmp_path / "three")])
    assert result.exit_code == 1
    assert "60000 windows" in result.output
    assert not (tmp_path / "three").exists()
