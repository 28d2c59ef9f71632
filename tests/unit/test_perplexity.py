import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import tiny_model
from tvaprune.artifacts import ArtifactError
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM
from tvaprune.measures.comparison import present_models, read_rows, spread_evenly
from tvaprune.measures.perplexity import Perplexity, evaluate, heldout_windows, read_texts, report, token_nll

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
    result = evaluate(model, windows, batch_size=2)
    assert result.tokens == len(flat) == 5 * 23
    assert result.nll_per_token == pytest.approx(mean, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.ppl_stderr == pytest.approx(math.exp(mean) * means.std().item() / math.sqrt(5), rel=1e-4)


def test_batches_and_chunks_change_nothing(model: PreTrainedModel, windows: torch.Tensor) -> None:
    whole = evaluate(model, windows, batch_size=5)
    for batch_size in (1, 3, 64):
        assert evaluate(model, windows, batch_size).nll_per_token == pytest.approx(whole.nll_per_token, rel=1e-6)
    with torch.no_grad():
        reference = token_nll(model, windows, positions_at_once=10_000)
        for positions in (1, 7, 23):
            torch.testing.assert_close(token_nll(model, windows, positions), reference)


def test_accepts_int32_and_keeps_the_models_mode(model: PreTrainedModel, windows: torch.Tensor) -> None:
    model.train()
    assert evaluate(model, windows.int(), 2) == evaluate(model, windows, 2)
    assert model.training
    model.eval()


def test_a_single_window_has_no_standard_error(model: PreTrainedModel, windows: torch.Tensor) -> None:
    assert math.isnan(evaluate(model, windows[:1], 1).ppl_stderr)


def test_windows_join_documents_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = heldout_windows(["w2 w3 w4", "w5", "w6 w7 w8 w9"], tokenizer, window=3, windows=3)
    assert windows.tolist() == [[2, 3, 4], [EOS, 5, EOS], [6, 7, 8]]  # w9 and the last EOS fill no window


def test_windows_are_spread_over_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"w{i}" for i in range(2, 92))
    windows = heldout_windows([text], tokenizer, window=9, windows=5)
    assert windows[:, 0].tolist() == [2 + 9 * i for i in (1, 3, 5, 7, 9)]
    with pytest.raises(ValueError, match=r"windows = 11 of window = 9 .* 91 tokens, enough for 10"):
        heldout_windows([text], tokenizer, window=9, windows=11)


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
    results = {
        "dense": Perplexity(20.0, math.log(20), 0.5, 100),
        "compact": Perplexity(30.0, math.log(30), 0.7, 100),
    }
    metrics = json.loads(json.dumps(report(results, window=16), allow_nan=False))
    assert metrics["compact"]["ratio_to_dense"] == 1.5
    assert "ratio_to_dense" not in metrics["dense"]
    assert metrics["tokens"] == 100
    assert "finetuned" not in metrics


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


def test_damaged_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no \.jsonl file"):
        read_texts(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"id": "1", "text": "two"}\n')
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "one"}\n')
    assert read_texts(tmp_path) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"id": "1", "text": "two"}\n{"id": \n')
    with pytest.raises(ArtifactError, match=r"b\.jsonl, line 2: not valid JSON"):
        read_rows(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(ArtifactError, match=r"b\.jsonl, line 1: no text"):
        read_texts(tmp_path)
