"""The dense teacher's hidden states, recomputed at each use or cached on disk.

Hidden states, not logits, because they serve every temperature, kind and top_k, and have width instead of vocabulary
numbers per token. The loss applies the teacher's lm_head.
"""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tvaprune.architecture.topology import hidden_states
from tvaprune.distributed import Process
from tvaprune.progress import Progress


def frozen_head(model: PreTrainedModel) -> Float[Tensor, "vocab width"]:
    """The lm_head weight, detached. Raises ValueError for a head that has a bias."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError("lm_head has a bias, which the distillation loss does not apply")
    return head.weight.detach()


class Teacher:
    """The dense model's hidden states of training windows (int32 or int64, on any device), recomputed at each use."""

    def __init__(self, model: PreTrainedModel, input_ids: Int[Tensor, "windows seq"]) -> None:
        self._model = model.eval()
        self._input_ids = input_ids
        self.head = frozen_head(model)
        self.window_tokens = input_ids.shape[1]

    @torch.no_grad()
    def hidden(self, windows: Sequence[int]) -> Float[Tensor, "tokens width"]:
        """In the model's dtype, on its device."""
        input_ids = self._input_ids[list(windows)].to(self.head.device).long()
        return hidden_states(self._model, input_ids).flatten(0, 1)


class CachedTeacher:
    """The same states of every window that training will use, computed once; the model is not needed afterwards.

    `path` is a memory-mapped file of windows · seq · width numbers in the model's dtype. A complete file of the same
    run is used again. Processes have a file each. Where they split the teacher's layers, each forward needs all of
    them, so that all take as many turns as the one with the most to compute.
    """

    def __init__(
        self, teacher: Teacher, windows: Collection[int], batch_size: int, path: Path, process: Process
    ) -> None:
        self.head = teacher.head.clone()  # a copy, because the teacher's will leave the device
        self._row = {window: row for row, window in enumerate(sorted(set(windows)))}
        shape = (len(self._row), teacher.window_tokens, self.head.shape[1])
        done, size = path.with_suffix(".done"), math.prod(shape) * self.head.dtype.itemsize
        complete = done.exists() and path.is_file() and path.stat().st_size == size
        if not complete:
            done.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            _reserve(path, size)
        states = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=self.head.dtype)
        self._states = states.view(shape)
        starts = range(0, len(self._row), batch_size)
        turns = 0 if complete else len(starts)
        if process.sharded:
            turns = int(process.world.max_(torch.tensor(turns, device=process.device)))
        ordered, silent = list(self._row), not process.world.is_main
        for turn in Progress(range(turns), desc="caching the teacher", unit="batch", disable=silent):
            start = starts[min(turn, len(starts) - 1)]
            batch = ordered[start : start + batch_size]
            states = teacher.hidden(batch).view(len(batch), *shape[1:])
            if not complete:
                self._states[start : start + len(batch)] = states.cpu()
        if not complete:
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # the pages reach the disk before the mark that they are complete
            done.touch()

    def hidden(self, windows: Sequence[int]) -> Float[Tensor, "tokens width"]:
        """In the teacher's dtype, on its head's device."""
        rows = [self._row[window] for window in windows]
        return self._states[rows].to(self.head.device).flatten(0, 1)


def _reserve(path: Path, size: int) -> None:
    """Allocate a file's bytes: where a disk fills up under a mapped file, the process ends without a message."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
