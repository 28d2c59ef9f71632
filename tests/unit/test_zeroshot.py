import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from scipy.stats import ttest_rel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from stages.eval_dense_zeroshot import main as measure_dense
from stages.eval_zeroshot import main
from tests.tiny_models import tiny_model
from tvaprune.artifacts import ArtifactError
from tvaprune.distributed import ALONE
from tvaprune.measures.zeroshot import (
    TASKS,
    Rows,
    Scores,
    _LanguageModel,
    describe,
    evaluate,
    select_rows,
    summarise,
)
from tvaprune.options.inputs import TASK_METRICS


def byte_model(seed: int) -> PreTrainedModel:
    return tiny_model("llama", seed, layers=2, vocab_size=257, max_position_embeddings=512)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = Tokenizer(models.BPE({**{char: i for i, char in enumerate(alphabet)}, "<eos>": 256}, []))
    by_byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_byte.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=by_byte, eos_token="<eos>", model_max_length=512)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight rows of each task, in the columns that lm-eval's prompts read."""
    folder = tmp_path / "zeroshot"
    folder.mkdir()

    def arc(i: int) -> dict[str, object]:
        labels = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3"]
        texts = [f"thing {i}{'x' * j}" for j in range(len(labels))]
        choices = {"text": texts, "label": labels}
        return {"id": str(i), "question": f"What is {i}?", "choices": choices, "answerKey": labels[i % 3]}

    rows = {
        "boolq": [{"passage": f"Fact {i}. " * (i + 1), "question": f"is it {i}", "label": i % 2} for i in range(8)],
        "piqa": [{"goal": f"Do {i}", "sol1": f"use {i} hands", "sol2": "wait", "label": i % 2} for i in range(8)],
        "hellaswag": [
            {
                "activity_label": "Cooking",
                "ctx_a": f"A cook takes {i} eggs.",
                "ctx_b": "she",
                "endings": [f"breaks {i}.", "sings [title] loud.", "runs.", f"paints {i * 7} walls."],
                "label": str(i % 4),
            }
            for i in range(8)
        ],
        "winogrande": [
            {"sentence": f"Ann met Bo as _ was {i} years old.", "option1": "Ann", "option2": "Bo", "answer": "1"}
            for i in range(8)
        ],
        "arc_easy": [arc(i) for i in range(8)],
        "arc_challenge": [arc(i + 20) for i in range(8)],
    }
    for task, some in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    """Token by token from the full logits, float64."""
    prompt, whole = tokenizer(context)["input_ids"], tokenizer(context + choice)["input_ids"]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))


def test_log_likelihoods_equal_lm_evals_own(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    requests = [(("", ""), tokens(n), tokens(m)) for n, m in [(3, 1), (40, 9), (12, 4), (1, 1), (520, 6), (7, 300)]]
    context = tokens(15)
    requests += [(("", str(last)), context, [last]) for last in (5, 6)]  # share one input
    requests += [(("", ""), context[:-2], [*context[-2:], 7])]  # shares it too, with a longer continuation
    greedy = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    *first, last = greedy[0, 15:].tolist()
    requests += [(("", "not to its end"), context, [*first, (last + 1) % 256])]
    requests += [(("", "greedy"), context, [*first, last])]

    # logits_cache=False: lm-eval 0.4.13 reads the wrong position where shared inputs have continuations of two lengths.
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32", logits_cache=False)
    expected = reference._loglikelihood_tokens(requests, disable_tqdm=True)
    assert expected[-1][1]  # the case of a greedy continuation is covered
    for batch_size in (1, 4, 64):
        found = _LanguageModel(model, tokenizer, batch_size, None, ALONE)._loglikelihood_tokens(requests)
        assert [all_greedy for _, all_greedy in found] == [all_greedy for _, all_greedy in expected]
        torch.testing.assert_close([nats for nats, _ in found], [nats for nats, _ in expected], rtol=1e-4, atol=1e-4)


def test_all_tasks_give_finite_numbers_under_the_documented_keys(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    scores = evaluate(model, tokenizer, select_rows(data, list(TASKS), limit=6), batch_size=8)
    result = summarise(scores, ["piqa", "hellaswag"])
    metrics = json.loads(json.dumps(result, allow_nan=False))
    assert set(metrics) == {*TASKS, "mean", "mean_stderr"}
    for task in TASKS:
        norm = {"acc_norm", "acc_norm_stderr"} if task not in ("boolq", "winogrande") else set()
        assert set(metrics[task]) == {"acc", "acc_stderr", *norm}
        assert 0 <= metrics[task]["acc"] <= 1
        assert (metrics[task]["acc"] * 6) == pytest.approx(round(metrics[task]["acc"] * 6))  # six rows were scored
        assert TASK_METRICS[task] in metrics[task]
    assert metrics["mean"] == pytest.approx((metrics["piqa"]["acc"] + metrics["hellaswag"]["acc_norm"]) / 2)


def test_the_mean_is_of_each_tasks_own_metric_and_leaves_the_other_tasks_out() -> None:
    scores = {
        "boolq": {"acc": 0.1, "acc_stderr": 0.5},
        "hellaswag": {"acc": 0.9, "acc_stderr": 0.9, "acc_norm": 0.4, "acc_norm_stderr": 0.03},
        "piqa": {"acc": 0.6, "acc_stderr": 0.04, "acc_norm": 0.9, "acc_norm_stderr": 0.9},
    }
    summary = summarise(Scores(scores, {}), ["piqa", "hellaswag"])
    assert summary["mean"] == pytest.approx(0.5)
    assert summary["mean_stderr"] == pytest.approx(0.025)
    assert summary["boolq"] == scores["boolq"]
    line = "compact: accuracy boolq 0.100, piqa 0.600, hellaswag 0.400; mean 0.500 ± 0.025"
    assert describe("compact", summary) == line


def test_the_difference_from_dense_pairs_the_rows() -> None:
    """Each task's error is that of the mean of its differences, row by row; here with scipy's paired t statistic."""
    generator = np.random.default_rng(1)
    own, other = ({"piqa": rows[0], "hellaswag": rows[1][:30]} for rows in generator.integers(0, 2, (2, 2, 50)))
    figures = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.07},
        "hellaswag": {"acc": 0.9, "acc_stderr": 0.9, "acc_norm": 0.4, "acc_norm_stderr": 0.03},
    }
    pruned, dense = (
        Scores(figures, {task: rows.astype(float).tolist() for task, rows in answers.items()})
        for answers in (own, other)
    )
    summary = summarise(pruned, ["piqa", "hellaswag"], dense)
    differences, errors = [], []
    for task in ("piqa", "hellaswag"):
        differences.append(float(np.mean(own[task]) - np.mean(other[task])))
        errors.append(differences[-1] / ttest_rel(own[task], other[task]).statistic)
    assert summary["mean_minus_dense"] == pytest.approx(sum(differences) / 2)
    assert summary["mean_minus_dense_stderr"] == pytest.approx(math.hypot(*errors) / 2)
    assert describe("compact", summary).endswith(
        f"{summary['mean_minus_dense']:+.3f} ± {summary['mean_minus_dense_stderr']:.3f} from dense"
    )
    same = summarise(dense, ["piqa", "hellaswag"], dense)
    assert same["mean_minus_dense"] == same["mean_minus_dense_stderr"] == 0


def test_accuracy_equals_a_direct_computation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    rows = select_rows(data, ["piqa", "boolq"], limit=None)
    right: list[float] = []
    normed = 0
    for row in rows["piqa"]:
        scores = [
            log_likelihood(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {row[sol]}")
            for sol in ("sol1", "sol2")
        ]
        right.append(float(scores.index(max(scores)) == row["label"]))
        by_byte = [scores[0] / len(row["sol1"]), scores[1] / len(row["sol2"])]
        normed += by_byte.index(max(by_byte)) == row["label"]
    yes = 0
    for row in rows["boolq"]:
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, choice) for choice in (" no", " yes")]
        yes += scores.index(max(scores)) == row["label"]
    result, answers = evaluate(model, tokenizer, rows, batch_size=3)
    assert answers["piqa"] == right
    assert result["piqa"]["acc"] == sum(right) / 8
    assert result["piqa"]["acc_norm"] == normed / 8
    assert result["boolq"]["acc"] == yes / 8
    p = sum(right) / 8
    assert result["piqa"]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 7))


def test_the_stage_scores_the_artifact_it_is_given(
    tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    """The published code scored the unpruned model: here other weights in the directory give other scores."""
    for name, seed in (("dense", 0), ("compact", 7)):
        byte_model(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    params = tmp_path / "params.yaml"
    tasks = "tasks: [piqa, arc_easy, hellaswag], mean_of: [piqa, arc_easy]"
    params.write_text(f"eval_zeroshot: {{{tasks}, limit: 8, batch_size: 8}}")

    reference = tmp_path / "dense.json"

    def scores() -> dict[str, Any]:
        metrics = tmp_path / "zeroshot.json"
        main(tmp_path / "dense", tmp_path / "compact", tmp_path / "none", data, reference, metrics, params)
        return json.loads(metrics.read_text())

    first = scores()
    assert set(first) == {"limit", "dense", "compact"}
    assert first["limit"] == 8
    assert first["compact"] != first["dense"]
    (tmp_path / "compact" / "model.safetensors").write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    second = scores()
    assert second["compact"] == {**first["dense"], "mean_minus_dense": 0, "mean_minus_dense_stderr": 0}
    assert second["dense"] == first["dense"]
    measure_dense(tmp_path / "dense", data, reference, params)
    assert scores() == second
    # It is read: another figure in it is reported; figures of another dtype are not, and the model is measured here.
    content = json.loads(reference.read_text())
    content["figures"]["figures"]["piqa"]["acc"] = 0.25
    reference.write_text(json.dumps(content))
    assert scores()["dense"]["piqa"]["acc"] == 0.25
    reference.write_text(json.dumps(content | {"dtype": "torch.float16"}))
    assert scores() == second
    reference.write_text(json.dumps(content))
    (data / "changed.jsonl").write_text("{}")  # other contents of what is measured on
    assert scores() == second
    (data / "changed.jsonl").unlink()
    assert scores()["dense"]["piqa"]["acc"] == 0.25
    params.write_text(params.read_text().replace("limit: 8", "limit: 6"))  # other rows
    assert scores()["dense"]["piqa"]["acc"] != 0.25


def test_rows_are_spread_and_the_same_each_time(data: Path) -> None:
    chosen = select_rows(data, ["piqa"], limit=4)
    assert [row["goal"] for row in chosen["piqa"]] == ["Do 1", "Do 3", "Do 5", "Do 7"]
    assert chosen == select_rows(data, ["piqa"], limit=4)
    everything: Rows = select_rows(data, ["piqa"], limit=None)
    assert len(everything["piqa"]) == 8
    assert select_rows(data, ["piqa"], limit=100) == everything


def test_missing_files_and_columns_are_named(data: Path) -> None:
    (data / "piqa.jsonl").write_text('{"goal": "g", "sol1": "a", "label": 0}\n')
    with pytest.raises(ArtifactError, match=r"piqa\.jsonl: rows without sol2"):
        select_rows(data, ["boolq", "piqa"], limit=None)
    (data / "piqa.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"piqa\.jsonl: no such file"):
        select_rows(data, ["piqa"], limit=2)
