"""Local inputs small enough that the whole pipeline takes seconds, and parameters that point at them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    *("the", "a", "and", "but", "over", "under", "slowly", "old", "green", "seven", "walks", "reads", "opens"),
    *("river", "stone", "house", "birds", "letter", "winter"),
)

# What differs from params.yaml; everything else stays, so that a new parameter needs no edit here.
SMALL: dict[str, dict[str, Any]] = {
    "fetch_inputs": {
        "model": {"source": "local", "path": "inputs/model"},
        "calibration": {
            "exclude_heldout": True,
            "sources": [
                {"source": "local", "label": "letters", "kind": "letters", "path": "inputs/letters"},
                {
                    "source": "local", "label": "notes", "kind": "notes", "path": "inputs/notes.jsonl",
                    "text_field": "body",
                },
            ],
        },
        "heldout": {
            "sources": [
                {"source": "local", "label": "stories", "kind": "stories", "path": "inputs/stories"},
                {"source": "local", "label": "more_letters", "kind": "letters", "path": "inputs/more_letters"},
            ],
        },
        "zeroshot": {"source": "local", "path": "inputs/zeroshot"},
    },
    "sample_calibration": {
        "samples": 24, "seq_len": 32, "validation_samples": 2,
        "finetune_samples": 16, "finetune_seq_len": 32, "finetune_validation_samples": 2,
        "mix": {}, "finetune_mix": None,
    },
    "adapt_dimensions": {"multiple": 16},
    "compact": {"prompt_tokens": 16},
    "finetune_lora": {"rank": 4, "alpha": 8, "steps": 30, "validate_every": 15, "save_every": 5},
    "benchmark_speed": {
        "prefill_tokens": 16, "decode_prompt_tokens": 4, "decode_tokens": 4, "repeats": 3, "max_warmup": 2,
    },
    "eval_perplexity": {
        "window": 32, "validation": {"stories": 4}, "test": {"stories": 4, "more_letters": 2},
    },
    "quantize": {
        "window": 32, "validation": {"stories": 2}, "test": {"stories": 2, "more_letters": 2},
        "prefill_tokens": 16, "decode_tokens": 4, "repeats": 3,
    },
    "eval_zeroshot": {
        "tasks": ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"], "limit": 3,
    },
}  # fmt: skip
SMALL_GATES = {"steps": 60, "curvature_windows": 2}


def write_inputs(directory: Path) -> None:
    """A random Llama with its tokenizer, four sets of texts, six tasks."""
    letters, notes, stories, more_letters = (_texts(seed) for seed in range(4))
    directory.mkdir()
    _write_model(directory / "model", letters)
    for name, texts in (("letters", letters), ("stories", stories), ("more_letters", more_letters)):
        (directory / name).mkdir()
        for number, text in enumerate(texts):
            (directory / name / f"{number:02}.txt").write_text(text)
    _write_rows(directory / "notes.jsonl", [{"body": text} for text in notes])
    (directory / "zeroshot").mkdir()
    for task, rows in _tasks().items():
        _write_rows(directory / "zeroshot" / f"{task}.jsonl", rows)


def write_small_params(path: Path) -> None:
    """Make a copy of the repository's params.yaml small."""
    yaml = YAML()
    content = yaml.load(path)
    for section, values in SMALL.items():
        content[section].update(values)
    content["learn_masks"]["tva"].update(SMALL_GATES)
    yaml.dump(content, path)


def _texts(seed: int, count: int = 24) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(20, 120))) + f" {seed}.{n}" for n in range(count)]


def _write_model(directory: Path, texts: list[str]) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>", model_max_length=256)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=3,
        vocab_size=320,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def _tasks(rows: int = 6) -> dict[str, list[dict[str, Any]]]:
    def arc(n: int) -> dict[str, Any]:
        choices = {"text": [f"stone {n}", f"river {n}", "house"], "label": ["A", "B", "C"]}
        return {"id": str(n), "question": f"What is {n}?", "choices": choices, "answerKey": "ABC"[n % 3]}

    def hellaswag(n: int) -> dict[str, Any]:
        endings = [f"opens {n}.", "walks.", "reads slowly.", f"is {n * 7}."]
        return {"activity_label": "Walks", "ctx_a": f"A bird {n}.", "ctx_b": "it", "endings": endings, "label": n % 4}

    def winogrande(n: int) -> dict[str, Any]:
        return {"sentence": f"Ann met Bo as _ was {n}.", "option1": "Ann", "option2": "Bo", "answer": str(n % 2 + 1)}

    return {
        "boolq": [{"passage": f"Fact {n}.", "question": f"is it {n}", "label": n % 2} for n in range(rows)],
        "piqa": [{"goal": f"Do {n}", "sol1": f"use {n}", "sol2": "wait", "label": n % 2} for n in range(rows)],
        "hellaswag": [hellaswag(n) for n in range(rows)],
        "winogrande": [winogrande(n) for n in range(rows)],
        "arc_easy": [arc(n) for n in range(rows)],
        "arc_challenge": [arc(n + rows) for n in range(rows)],
    }


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
