"""The leak check: windows back to text, what a model reads of a row, the limit, and what is declared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tests.unit.test_inputs_zeroshot import ROWS, write_tasks
from tvaprune.inputs import leaks as module
from tvaprune.inputs.calibration import load_tokenizer
from tvaprune.inputs.leaks import (
    EvaluationDocument,
    LeakError,
    check_leaks,
    check_limit,
    declare_sources,
    evaluation_documents,
    report,
    short_texts,
    window_texts,
)
from tvaprune.inputs.sources import InputError

PLANTED = "the quick brown fox jumps over the lazy dog and runs away from it all"
OTHER = "nobody has ever seen such a thing happen in this town before or after that day"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    tiny_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def windows(tokenizer: Any, *texts: str, length: int = 128) -> torch.Tensor:
    """One window a text, filled up with end-of-text tokens, int32."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return torch.tensor([one + [tokenizer.eos_token_id] * (length - len(one)) for one in ids], dtype=torch.int32)


def found(tokenizer: Any, calibration: str, finetuning: str, evaluated: list[str], n: int = 5) -> module.Leaks:
    ids = {"input_ids": windows(tokenizer, calibration), "finetune_ids": windows(tokenizer, finetuning)}
    ids |= {name: torch.zeros(0, 4, dtype=torch.int32) for name in ("validation_ids", "finetune_validation_ids")}
    documents = [EvaluationDocument(f"page {index}", [text]) for index, text in enumerate(evaluated)]
    return check_leaks(ids, tokenizer, {"heldout": documents}, n)


def test_windows_become_the_text_of_each_document(tokenizer: Any) -> None:
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("It's here.", " The bank"))
    row = torch.tensor([[*one, tokenizer.eos_token_id, *two]], dtype=torch.int32)
    assert list(window_texts(row, tokenizer)) == ["It's here.", " The bank"]


def test_no_gram_spans_two_documents(tokenizer: Any) -> None:
    """Two halves that follow each other in a window are not the whole."""
    start, end = PLANTED.split(" over ")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, " over " + end)]
    row = torch.tensor([[*ids[0], tokenizer.eos_token_id, *ids[1]]], dtype=torch.int32)
    hashed = module.known_ngrams(window_texts(row, tokenizer), 8)
    assert len(hashed) == len(("over " + end).split()) - 7


def test_each_share_is_of_the_sets_own_grams(tokenizer: Any) -> None:
    evaluated = [f"We say that {PLANTED.upper()}!", OTHER, "too short"]
    leaks = found(tokenizer, OTHER, f"Once, {PLANTED.replace(' ', ', ')}.", evaluated)
    grams = [len(text.split()) - 4 for text in (evaluated[0], OTHER)]
    held = leaks.sets["heldout"]
    assert (held.ngrams, held.documents, held.judged) == (sum(grams), 3, 2)
    assert held.overlaps["finetuning"].ngrams == len(PLANTED.split()) - 4
    assert held.overlaps["finetuning"].examples == ["page 0"]
    assert held.overlaps["calibration"].ngrams == len(OTHER.split()) - 4
    assert held.overlaps["calibration"].examples == ["page 1"]
    assert leaks.finetuning_in_calibration == 0
    numbers = report(leaks, 5, {})["sets"]["heldout"]
    assert numbers["in_calibration"] == {"ngram_share": grams[1] / sum(grams), "document_share": 1 / 3}


@pytest.mark.parametrize(
    "text", ["模型在训练时看到了这段文字所以测试没有意义", "これは学習に使われた文章です", "ข้อความนี้อยู่ในข้อมูลฝึก"]
)
def test_letters_are_words_in_scripts_without_spaces(text: str) -> None:
    known = {"calibration": module.known_ngrams([f"Read this: {text}!"], 8)}
    compared = module.compare([EvaluationDocument("page", [text])], known, 8)
    assert compared.judged == 1
    assert compared.share("calibration") == 1


def test_sets_of_short_texts_are_told(tokenizer: Any) -> None:
    assert short_texts(found(tokenizer, "x", "x", [PLANTED, "one"]), 5) == []
    assert short_texts(found(tokenizer, "x", "x", ["one", "two", PLANTED]), 5) == [
        "heldout: 2 of 3 documents have fewer than 5 words, so nothing was compared of them; lower check_leaks.ngram"
    ]


def test_validation_windows_count_as_learned_from(tokenizer: Any) -> None:
    names = [part for parts in module.LEARNED_FROM.values() for part in parts]
    for planted in names:
        ids = {name: windows(tokenizer, PLANTED if name == planted else "x") for name in names}
        leaks = check_leaks(ids, tokenizer, {"heldout": [EvaluationDocument("p", [PLANTED])]}, 5)
        assert leaks.largest == 1.0, planted


def test_above_the_limit_the_set_the_share_the_limit_and_the_remedy_are_named(tokenizer: Any) -> None:
    leaks = found(tokenizer, "x", PLANTED, [PLANTED, OTHER])
    share = leaks.sets["heldout"].share("finetuning")
    assert 0.4 < share < 0.5
    check_limit(leaks, 5, share)
    with pytest.raises(LeakError) as caught:
        check_limit(leaks, 5, 0.25)
    message = str(caught.value)
    assert "check_leaks.max_overlap = 0.25" in message
    assert (
        f"heldout: {share:.4f} of its 5-grams are in the finetuning windows, from 1 of 2 documents (page 0)" in message
    )
    assert "take that text out of fetch_inputs.calibration" in message
    assert "in the calibration windows" not in message


def test_the_share_of_finetuning_is_of_its_own_grams(tokenizer: Any) -> None:
    assert found(tokenizer, f"{PLANTED} {OTHER}", PLANTED, ["x"]).finetuning_in_calibration == 1.0
    assert 0.2 < found(tokenizer, PLANTED, f"{PLANTED} {OTHER}", ["x"]).finetuning_in_calibration < 0.5


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_the_first_three_leaked_documents_are_examples(
    batch: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", batch)
    overlap = found(tokenizer, PLANTED, "x", [OTHER, *[PLANTED] * 5]).sets["heldout"].overlaps["calibration"]
    assert overlap.examples == ["page 1", "page 2", "page 3"]
    assert overlap.documents == 5


def test_of_a_row_the_text_that_is_scored_is_compared(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", ROWS)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "wiki.jsonl").write_text(json.dumps({"id": "A page", "text": "Some text."}) + "\n")
    sets = {
        name: list(documents) for name, documents in evaluation_documents(tmp_path / "held", tmp_path / "tasks").items()
    }
    assert sets["heldout_wiki"] == [EvaluationDocument("A page", ["Some text."])]
    assert set(sets) == {"heldout_wiki", *ROWS}
    for task in ROWS:
        assert [one.name for one in sets[task]] == ["line 1"]
    row = ROWS["hellaswag"]
    assert sets["hellaswag"][0].pieces == [f"{row['ctx_a']} {row['ctx_b']} {ending}" for ending in row["endings"]]
    row = ROWS["winogrande"]
    assert sets["winogrande"][0].pieces[1] == row["sentence"].replace("_", row["option2"])
    row = ROWS["piqa"]
    assert sets["piqa"][0].pieces[0] == f"{row['goal']} {row['sol1']}"


def test_a_damaged_or_missing_task_is_named(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", ROWS)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "wiki.jsonl").write_text('{"id": "1", "text": "x"}\n')
    (tmp_path / "tasks" / "piqa.jsonl").write_text('{"goal": "x"}\n')
    sets = evaluation_documents(tmp_path / "held", tmp_path / "tasks")
    with pytest.raises(InputError, match=r"piqa.jsonl, line 1: missing or wrong column 'sol1'"):
        list(sets["piqa"])
    (tmp_path / "tasks" / "boolq.jsonl").unlink()
    with pytest.raises(InputError, match=r"boolq.jsonl: no such file"):
        evaluation_documents(tmp_path / "held", tmp_path / "tasks")


@pytest.mark.parametrize(("windows_of_it", "same_kind"), [(4, 1), (0, 0)])
def test_text_of_a_kind_that_was_learned_from_is_declared(tmp_path: Path, windows_of_it: int, same_kind: int) -> None:
    """By kind, not by package: two packages can hold text of Wikipedia, and one can hold text of two kinds."""
    for name, kinds in (
        ("calibration", {"extracts": "wikipedia", "speeches": "speeches"}),
        ("heldout", {"dump": "wikipedia", "solutions": "mathematics"}),
    ):
        (tmp_path / name).mkdir()
        sources = {label: {"kind": kind, "source": "package", "name": "one"} for label, kind in kinds.items()}
        (tmp_path / name / "meta.json").write_text(json.dumps({"sources": sources}))
    parts = {"extracts": windows_of_it, "speeches": 3}
    counts = {part: parts for all_parts in module.LEARNED_FROM.values() for part in all_parts}
    declared = declare_sources(counts, tmp_path / "calibration", tmp_path / "heldout")
    assert declared["finetuning"] == {
        "same_kind": {"dump": same_kind, "solutions": 0},
        "windows": {"extracts": 2 * windows_of_it, "speeches": 6},
    }
    assert set(declared) == {"calibration", "finetuning"}
