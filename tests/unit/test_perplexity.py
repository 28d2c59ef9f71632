import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import tiny_model
from tvaprune.artifacts import ArtifactError
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM
from tvaprune.measures.comparison import present_models, read_jsonl, spread_evenly
from tvaprune.measures.perplexity import (
    Perplexity,
    describe,
    evaluate,
    heldout_windows,
    nll_by_window,
    report,
    token_nll,
    windows_of,
)

EOS = 1


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    # Far from uniform predictions, so that a shifted target would show.
    return tiny_model("llama", layers=2, initializer_range=0.3)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, 100)}}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", bos_token="w99")


def naive_nll(model: PreTrainedModel, windows: torch.Tensor) -> list[list[float]]:
    """One window and one token at a time, in float64, from the model's own full logits."""
    all_nll = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0].double()
        all_nll.append([-(logits[i] - logits[i].logsumexp(0))[window[i + 1]].item() for i in range(len(window) - 1)])
    return all_nll


@pytest.fixture(scope="module")
def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """The compact model's own class, with uneven layers and an empty one."""
    torch.manual_seed(2)
    config = TvaPruneConfig("llama", model.config.to_dict(), 48, intermediate_sizes=[0, 40], kv_head_counts=[0, 1])
    return TvaPruneForCausalLM(config).eval()


@pytest.mark.parametrize("which", ["model", "pruned"])
def test_equals_a_direct_computation(which: str, windows: torch.Tensor, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    nll = naive_nll(model, windows)
    flat = [value for window in nll for value in window]
    mean = sum(flat) / len(flat)
    means = torch.tensor([sum(window) / len(window) for window in nll])
    result = Perplexity.of(nll_by_window(model, windows, batch_size=2), window=24)
    assert result.tokens == len(flat) == 5 * 23
    assert result.nll_per_token == pytest.approx(mean, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.ppl_stderr == pytest.approx(math.exp(mean) * means.std().item() / math.sqrt(5), rel=1e-4)


def test_batches_and_chunks_change_nothing(model: PreTrainedModel, windows: torch.Tensor) -> None:
    whole = nll_by_window(model, windows, batch_size=5)
    for batch_size in (1, 3, 64):
        torch.testing.assert_close(nll_by_window(model, windows, batch_size), whole, rtol=1e-6, atol=0)
    with torch.no_grad():
        reference = token_nll(model, windows, positions_at_once=10_000)
        for positions in (1, 7, 23):
            torch.testing.assert_close(token_nll(model, windows, positions), reference)


def test_accepts_int32_and_keeps_the_models_mode(model: PreTrainedModel, windows: torch.Tensor) -> None:
    model.train()
    assert torch.equal(nll_by_window(model, windows.int(), 2), nll_by_window(model, windows, 2))
    assert model.training
    model.eval()


def test_a_single_window_has_no_standard_error() -> None:
    assert math.isnan(Perplexity.of(torch.tensor([2.0], dtype=torch.float64), 24).ppl_stderr)


def test_a_loss_that_is_not_finite_is_named(windows: torch.Tensor) -> None:
    broken = tiny_model("llama", layers=2)
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="compact: the loss on test text b is not finite; set TVAPRUNE_DTYPE=float32"):
        evaluate(broken, {"test": {"b": windows}}, 5, progress="compact")


def test_texts_are_measured_together_as_they_are_alone(model: PreTrainedModel, windows: torch.Tensor) -> None:
    sets = {"validation": {"a": windows[:2]}, "test": {"b": windows[2:3], "a": windows[3:]}}
    together = evaluate(model, sets, batch_size=3)
    assert {name: list(texts) for name, texts in together.items()} == {"validation": ["a"], "test": ["b", "a"]}
    for name, texts in sets.items():
        for label, own in texts.items():
            alone = Perplexity.of(nll_by_window(model, own, 1), 24)
            assert together[name][label].ppl == pytest.approx(alone.ppl, rel=1e-6)
            assert together[name][label].tokens == alone.tokens


def test_windows_join_documents_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    windows, none = windows_of(["w2 w3 w4", "w5", "w6 w7 w8 w9"], tokenizer, 3, validation=3, test=0)
    assert none.shape == (0, 3)
    assert windows.tolist() == [[2, 3, 4], [EOS, 5, EOS], [6, 7, 8]]  # w9 and the last EOS fill no window


def test_windows_are_spread_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"w{i}" for i in range(2, 92))
    windows, _ = windows_of([text], tokenizer, 9, validation=5, test=0)
    _, tested = windows_of([text], tokenizer, 9, validation=0, test=5)
    assert torch.equal(windows, tested)
    assert windows[:, 0].tolist() == [2 + 9 * i for i in (1, 3, 5, 7, 9)]
    with pytest.raises(ValueError, match=r"windows = 11 of window = 9 tokens: validation text x has 91 .* for 10"):
        windows_of([text], tokenizer, 9, validation=11, test=0, label="x")
    with pytest.raises(ValueError, match=r"test text x, without validation documents, has 1 tokens, enough for 0"):
        windows_of([text], tokenizer, 9, validation=10, test=1, label="x")


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    window=st.integers(2, 16),
    validation=st.integers(0, 8),
    test=st.integers(0, 8),
)
def test_no_document_is_in_both_validation_and_test(
    tokenizer: PreTrainedTokenizerFast, lengths: list[int], window: int, validation: int, test: int
) -> None:
    """Each document repeats a word of its own, so that the words of a window say which documents are in it."""
    texts = [" ".join([f"w{number + 2}"] * length) for number, length in enumerate(lengths)]
    try:
        chosen, tested = windows_of(texts, tokenizer, window, validation, test)
    except ValueError:
        alone = sum(lengths) + len(lengths)
        assert alone // window < validation + test or validation
        return
    assert (chosen.shape, tested.shape) == ((validation, window), (test, window))
    owner = [number for number, length in enumerate(lengths) for _ in range(length + 1)]
    starts = spread_evenly(len(owner) // window, validation) if validation else []
    touched = {number for start in starts for number in owner[start * window : (start + 1) * window]}
    if sum(number not in touched for number in owner) >= test * window:  # whole documents leave enough
        assert set(chosen.flatten().tolist()) & set(tested.flatten().tolist()) <= {EOS}
    # Validation windows do not depend on the test windows.
    assert torch.equal(chosen, windows_of(texts, tokenizer, window, validation, 0)[0])


@pytest.mark.parametrize("texts", [1, 3])
def test_a_few_long_texts_have_room_for_validation_and_test(tokenizer: PreTrainedTokenizerFast, texts: int) -> None:
    """Parts of them, none of which is in both sets."""
    words = [f"w{number}" for number in range(2, 98)]
    long = [" ".join(words[start::texts]) for start in range(texts)]
    validation, test = windows_of(long, tokenizer, 4, 8, 6)
    assert (validation.shape, test.shape) == ((8, 4), (6, 4))
    assert set(validation.flatten().tolist()) & set(test.flatten().tolist()) <= {EOS}


def test_text_that_spells_a_special_token_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    validation, _ = windows_of([f"w1 {tokenizer.eos_token} w2 w3", "w4 w5 w6"], tokenizer, 4, 2, 0)
    assert int((validation == end).sum()) <= 2


def test_windows_by_set_and_label(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {name: [f"w{first} " * 9 for first in range(start, start + 4)] for name, start in (("a", 2), ("b", 10))}
    found = heldout_windows(texts, tokenizer, 10, validation={"a": 1}, test={"b": 2, "a": 3})
    assert {name: {label: own.shape[0] for label, own in each.items()} for name, each in found.items()} == {
        "validation": {"a": 1},
        "test": {"a": 3, "b": 2},
    }
    with pytest.raises(ValueError, match="no held-out text c; there is a, b"):
        heldout_windows(texts, tokenizer, 10, validation={"a": 1}, test={"c": 1})


@pytest.mark.parametrize(("available", "wanted"), [(1, 1), (10, 10), (10, 3), (3270, 40), (7, 6)])
def test_spread_is_unique_ascending_and_balanced(available: int, wanted: int) -> None:
    chosen = spread_evenly(available, wanted)
    assert len(set(chosen)) == wanted
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < available
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(chosen[0] - (available - 1 - chosen[-1])) <= 1


def test_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="4 rows wanted, 3 available"):
        spread_evenly(3, 4)


def test_report_is_finite_numbers(tmp_path: Path) -> None:
    def measured(spread: float, *ppl: float) -> dict[str, dict[str, Perplexity]]:
        wiki, *others = (
            Perplexity(one, math.log(one), one / 40, 100, [math.log(one) - spread, math.log(one) + spread])
            for one in ppl
        )
        return {"validation": {"wiki": wiki}, "test": dict(zip(("wiki", "code"), others, strict=True))}

    results = {"dense": measured(0.1, 20, 10, 5), "compact": measured(0.3, 30, 20, 40)}
    metrics = json.loads(json.dumps(report(results, window=16), allow_nan=False))
    assert metrics["tokens"] == {"validation": {"wiki": 100}, "test": {"wiki": 100, "code": 100}}
    assert metrics["dense"]["validation"] == {
        "wiki": {"ppl": 20, "nll_per_token": pytest.approx(math.log(20)), "ppl_stderr": 0.5}
    }
    assert metrics["compact"]["test"]["code"]["ratio_to_dense"] == pytest.approx(8)
    assert metrics["compact"]["validation_ratio"] == pytest.approx(1.5)
    assert metrics["compact"]["test_ratio"] == pytest.approx(4)
    # Paired by window, the log ratio of each text is 0.2 below and above its mean, so its standard error is 0.2.
    assert metrics["compact"]["validation_ratio_stderr"] == pytest.approx(1.5 * 0.2)
    assert metrics["compact"]["test_ratio_stderr"] == pytest.approx(4 * 0.2 / 2**0.5)
    assert set(metrics["dense"]) == {"validation", "test"}
    assert "finetuned" not in metrics
    assert describe("dense", metrics["dense"]) == "dense: perplexity, validation wiki 20.00; test wiki 10.00, code 5.00"
    assert describe("compact", metrics["compact"]) == (
        "compact: perplexity, validation wiki 30.00 (1.500 of dense); test wiki 20.00, code 40.00 (4.000 of dense)"
    )
    only_validation = {model: {"validation": sets["validation"], "test": {}} for model, sets in results.items()}
    assert "test_ratio" not in report(only_validation, window=16)["compact"]


def test_models_that_are_absent(tmp_path: Path) -> None:
    dense, compact, finetuned = (tmp_path / name for name in ("dense", "compact", "finetuned"))
    for directory in (dense, compact, finetuned):
        directory.mkdir()
    (dense / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"compact: no config.json"):
        present_models(dense, compact, finetuned)
    (compact / "config.json").write_text("{}")
    assert list(present_models(dense, compact, finetuned)) == ["dense", "compact"]
    (finetuned / "config.json").write_text("{}")
    assert list(present_models(dense, compact, finetuned)) == ["dense", "compact", "finetuned"]


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"id": "1", "text": "two"}\n{"id": \n')
    with pytest.raises(ArtifactError, match=r"b\.jsonl, line 2: not valid JSON"):
        read_jsonl(tmp_path / "b.jsonl")
