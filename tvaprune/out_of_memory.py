"""Say that memory ran out, and which parameters to lower. Loads without torch, so that every stage can use it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WINDOWS = "sample_calibration.seq_len, or the batch_size or windows of the method under learn_masks"
_SEVERAL_GPUS = "or split the model over several GPUs (TVAPRUNE_NPROC with TVAPRUNE_SHARD=1)"
ADVICE = {
    "learn_masks": f"lower {_WINDOWS}, set learn_masks.gradient_checkpointing: true, {_SEVERAL_GPUS}",
    "finetune_lora": "lower finetune_lora.batch_size, finetune_lora.rank or sample_calibration.finetune_seq_len, "
    f"set finetune_lora.gradient_checkpointing: true, {_SEVERAL_GPUS}",
    "eval_dense_perplexity": f"lower eval_perplexity.batch_size, {_SEVERAL_GPUS}",
    "eval_perplexity": f"lower eval_perplexity.batch_size, {_SEVERAL_GPUS}",
    "eval_dense_zeroshot": f"lower eval_zeroshot.batch_size, {_SEVERAL_GPUS}",
    "eval_zeroshot": f"lower eval_zeroshot.batch_size, {_SEVERAL_GPUS}",
    "benchmark_speed": "lower the numbers in benchmark_speed.batch_sizes, or benchmark_speed.prefill_tokens",
    "profile_hardware": "lower profile_hardware.batch_size or profile_hardware.prefill_tokens",
    "compact": "lower compact.prompt_tokens, or use a machine with more memory",
}
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


class OutOfMemory(ValueError):  # noqa: N818  (torch has an OutOfMemoryError of another kind)
    """Memory ran out; the message says what to lower."""


def advice(module: str) -> str:
    """What to lower, for a module such as `stages.learn_masks`."""
    return ADVICE.get(module.rpartition(".")[2], "use a machine with more memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's CPU allocator or a GPU had no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    )


@contextmanager
def memory_errors_named() -> Iterator[None]:
    """Turn the errors of an allocation that failed into one `OutOfMemory` that names the running stage's parameters."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        specification = getattr(sys.modules["__main__"], "__spec__", None)
        module = specification.name if specification else ""
        reason = (str(error).strip().splitlines() or ["MemoryError"])[0]
        raise OutOfMemory(f"{module}: out of memory ({reason}). To need less, {advice(module)}") from error
