"""A run through the stages as scripts, without DVC: a random model of published shapes, random text, few steps."""

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tools.compaction_cost import write_noise
from tools.gpu.parts import PARTS, REPOSITORY, Settings
from tools.measured_process import run_measured
from tools.run_rows import Row, with_values
from tvaprune.checkpoint.config import load_config
from tvaprune.device import pick_device, pick_dtype
from tvaprune.estimate import PUBLISHED, memory, sizes
from tvaprune.inputs.documents import Document, write_documents

DENSE, COMPACT = Path("data/model"), Path("artifacts/compact")
_TEXT = Path("data/calibration/random.jsonl")
_FULL, _TINY = ("llama-3-8b-80gb", "Meta-Llama-3-8B"), ("glassllm", "glassllm")  # file of configs/, of configs/models/
# What is changed in the file: as many windows as the steps take, and fewer rounds.
_FEW: dict[str, Any] = {
    "sample_calibration.samples": 256,
    "sample_calibration.validation_samples": 8,
    "sample_calibration.finetune_samples": 320,
    "sample_calibration.finetune_validation_samples": 8,
    "learn_masks.tva.steps": 40,
    "compact.prompt_tokens": 16,
    "finetune_lora.steps": 20,
    "finetune_lora.validate_every": 20,
    "finetune_lora.save_every": 20,
    "benchmark_speed.decode_tokens": 64,
    "benchmark_speed.repeats": 7,
    "benchmark_speed.max_warmup": 3,
}
_FEWER = _FEW | {
    "sample_calibration.samples": 16,
    "sample_calibration.finetune_samples": 24,
    "learn_masks.tva.steps": 4,
    "learn_masks.tva.curvature_windows": 2,
    "finetune_lora.steps": 2,
    "benchmark_speed.prefill_tokens": 8,
    "benchmark_speed.decode_prompt_tokens": 4,
    "benchmark_speed.decode_tokens": 2,
    "benchmark_speed.repeats": 3,
    "benchmark_speed.max_warmup": 2,
}
_DOCUMENTS, _CHARACTERS = (800, 1000)  # a character is a token


def whole(step: str, settings: Settings) -> dict[str, Any]:
    """`inputs`, or a stage: seconds, and the most memory that it took, on the host and of the device.

    A machine may lack what an earlier call made on another: then the steps before are repeated, and not recorded.
    """
    root = workspace(settings)
    order = PARTS["whole"].steps
    for earlier in order[: order.index(step)]:
        if not _marker(root, earlier).is_file():
            _run(earlier, root, settings)
    return _run(step, root, settings)


def workspace(settings: Settings) -> Path:
    """The directory that the stages run in."""
    return settings.work / ("tiny" if settings.tiny else "8b")


def _marker(root: Path, step: str) -> Path:
    return root / "done" / step


def _run(step: str, root: Path, settings: Settings) -> dict[str, Any]:
    if step == "inputs":
        started = time.perf_counter()
        write_inputs(root, settings)
        figures: dict[str, Any] = {"seconds": time.perf_counter() - started}
    else:
        with device_memory() as device:
            figures = run_stage(step, root)
        estimates = memory(sizes(root / "params.yaml", root / DENSE), pick_dtype(pick_device()), pick_device().type)
        figures |= device | {"estimated_memory_bytes": estimates.get(step, {}).get("total")}
    _marker(root, step).parent.mkdir(exist_ok=True)
    _marker(root, step).touch()
    return figures


def write_inputs(root: Path, settings: Settings) -> None:
    """What fetch_inputs would have fetched, and params.yaml."""
    params, model = _TINY if settings.tiny else _FULL
    config = load_config(PUBLISHED / model)
    (root / _TEXT).parent.mkdir(parents=True, exist_ok=True)
    row = Row(set=_FEWER if settings.tiny else _FEW, target=[])
    (root / "params.yaml").write_text(with_values((REPOSITORY / "configs" / f"{params}.yaml").read_text(), row))
    letters = random.Random(0)
    texts = ("".join(letters.choices("abcdefghijkl mnop", k=_CHARACTERS)) for _ in range(_DOCUMENTS))
    write_documents(root / _TEXT, (Document(str(number), text) for number, text in enumerate(texts)))
    byte_tokenizer().save_pretrained(root / DENSE)
    write_noise(config, root / DENSE)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and one that ends a text."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>")


def run_stage(stage: str, root: Path) -> dict[str, Any]:
    """Seconds and the peak resident set of a stage's process. Raises RuntimeError, with its last lines, if it fails."""
    log = root / f"{stage}.log"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    with log.open("w") as out:
        started = [sys.executable, "-m", f"stages.{stage}"]
        status, figures = run_measured(started, root, out, variables | {"PYTHONPATH": str(REPOSITORY)})
    if status:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"stages.{stage} ended with status {status}:\n{last}")
    return figures


@contextmanager
def device_memory() -> Iterator[dict[str, int]]:
    """The most memory of a GPU in use during the block, beyond that at its start; nothing on a CPU.

    Of all processes, as the driver counts: with each process's context and what its allocator keeps.
    """
    found: dict[str, int] = {}
    if pick_device().type != "cuda":
        yield found
        return

    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    before, ended = used(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            found["device_memory_bytes"] = max(found.get("device_memory_bytes", 0), used() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
