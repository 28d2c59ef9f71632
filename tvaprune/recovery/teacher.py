"""Hidden states: the student's, and the dense teacher's, computed as needed or kept on disk.

Hidden states are kept rather than logits: they are exact for every temperature, kind and top_k, and take
width instead of vocabulary numbers a token. The teacher's lm_head is applied inside the loss.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel


def final_hidden(model: PreTrainedModel, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "tokens width"]:
    """What lm_head would be given (after the final norm), flattened to batch·seq tokens."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)


def frozen_head(model: PreTrainedModel) -> Float[Tensor, "vocab width"]:
    """The lm_head weight, detached. Raises ValueError for a head that has a bias."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError("lm_head has a bias, which the distillation loss does not apply")
    return head.weight.detach()


class Teacher:
    """The dense model's hidden states for chosen training windows, recomputed at every use.

    Args:
        model: on the device it is to run on.
        input_ids: int32 or int64 [windows, seq], on any device.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Int[Tensor, "windows seq"]) -> None:
        self._model = model.eval()
        self._input_ids = input_ids
        self.head = frozen_head(model)
        self.window_tokens = input_ids.shape[1]

    @torch.no_grad()
    def hidden(self, windows: Sequence[int]) -> Float[Tensor, "tokens width"]:
        """In the model's dtype, on its device."""
        return final_hidden(self._model, self._input_ids[list(windows)].to(self.head.device).long())


class CachedTeacher:
    """The same states, computed once for the windows that training will use, and then the model is let go.

    Args:
        teacher: the source.
        windows: every window that will be asked for.
        batch_size: windows a forward pass.
        path: file to keep them in, memory-mapped; its size is windows · seq · width · bytes of the dtype.
            A complete file of the same run is used again.
    """

    def __init__(self, teacher: Teacher, windows: Collection[int], batch_size: int, path: Path) -> None:
        # A copy, because the module that owns it will leave the device.
        self.head = teacher.head.clone()
        self._row = {window: row for row, window in enumerate(sorted(set(windows)))}
        size = (len(self._row), teacher.window_tokens, self.head.shape[1])
        done = path.with_suffix(".done")
        if not done.exists():
            path.unlink(missing_ok=True)
        self._states = torch.from_file(
            str(path), shared=True, size=size[0] * size[1] * size[2], dtype=self.head.dtype
        ).view(size)
        if not done.exists():
            ordered = list(self._row)
            for start in tqdm(range(0, len(ordered), batch_size), desc="caching the teacher", unit="batch"):
                batch = ordered[start : start + batch_size]
                self._states[start : start + len(batch)] = teacher.hidden(batch).view(len(batch), *size[1:]).cpu()
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # the map's pages reach the disk before the mark that they are whole
            done.touch()

    def hidden(self, windows: Sequence[int]) -> Float[Tensor, "tokens width"]:
        """In the teacher's dtype, on its head's device."""
        rows = [self._row[window] for window in windows]
        return self._states[rows].to(self.head.device).flatten(0, 1)
