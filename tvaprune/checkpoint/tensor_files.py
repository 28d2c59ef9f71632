"""Read and write safetensors a block of rows at a time, so that memory does not grow with the model.

The safetensors library writes a file from tensors that are all in memory, and a file that it has mapped counts as
resident as far as it was read. Here a file is opened anew for each block, and written from a header that is known
beforehand: the format is 8 bytes of length, a JSON header, and the tensors' bytes one after another
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvaprune.artifacts import write_json

SHARD_BYTES = 5_000_000_000
_BLOCK_BYTES = 64_000_000
# The format's names of the dtypes that models are stored in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor that is not loaded."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model directory's safetensors files, in the files' order.

    Attributes:
        info: by tensor name.
    """

    info: dict[str, TensorInfo]
    _files: dict[str, Path]

    @classmethod
    def of(cls, directory: Path) -> "Checkpoint":
        """Read the headers.

        Raises:
            FileNotFoundError: the directory has no safetensors.
            ValueError: a damaged file, or a dtype that is no floating one of 16 bits or more.
        """
        shards = sorted(directory.glob("*.safetensors"))
        if not shards:
            raise FileNotFoundError(f"{directory}: no .safetensors file; convert the checkpoint to safetensors first")
        info: dict[str, TensorInfo] = {}
        files: dict[str, Path] = {}
        for shard in shards:
            try:
                with safe_open(shard, framework="pt") as file:
                    names = list(file.offset_keys())
                    slices = {name: file.get_slice(name) for name in names}
                    described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            except SafetensorError as error:
                raise ValueError(f"{shard}: damaged safetensors file ({error}); fetch it again") from error
            for name, (shape, code) in described.items():
                if code not in _DTYPES:
                    raise ValueError(f"{shard}: {name} is stored as {code}; use a checkpoint in {', '.join(_DTYPES)}")
                info[name] = TensorInfo(shape, _DTYPES[code])
                files[name] = shard
        return cls(info, files)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """One tensor's rows in blocks of some 64 MB: the first row's index and the rows."""
        info = self.info[name]
        rows = info.shape[0] if info.shape else 1
        step = max(1, _BLOCK_BYTES * rows // max(info.nbytes, 1))
        for start in range(0, rows, step):
            with safe_open(self._files[name], framework="pt") as file:
                yield start, file.get_slice(name)[start : start + step]


def plan_shards(tensors: dict[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    """Tensors in order into shards of at most `limit` bytes; a tensor beyond it has a shard of its own."""
    shards: list[dict[str, TensorInfo]] = []
    used = 0
    for name, info in tensors.items():
        if not shards or used + info.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = info
        used += info.nbytes
    return shards


class CheckpointWriter(AbstractContextManager):
    """Writes model.safetensors, or several shards with the index that transformers reads.

    Every tensor that was announced has to be written, in any number of blocks of rows but in the announced order.
    """

    def __init__(self, directory: Path, tensors: dict[str, TensorInfo], limit: int | None = None) -> None:
        self.directory = directory
        self.shards = plan_shards(tensors, limit or SHARD_BYTES)
        self._order = iter(tensors.items())
        self._left = 0
        self._starts = {next(iter(shard)): index for index, shard in enumerate(self.shards)}
        self._file: BinaryIO | None = None

    def begin(self, name: str) -> None:
        """Start the next tensor.

        Raises:
            ValueError: another one is due, or the last one is not complete: a bug, not a user's mistake.
        """
        due, info = next(self._order, (None, TensorInfo((), torch.float32)))
        if due != name or self._left:
            raise ValueError(f"tensor {name!r} came where {due!r} was due, {self._left} bytes short before it")
        if name in self._starts:
            self._open(self._starts[name])
        self._left = info.nbytes

    def write(self, block: Tensor) -> None:
        """The next rows of the tensor begun, in the announced dtype."""
        assert self._file is not None
        self._left -= block.nbytes
        if self._left < 0:
            raise ValueError(f"{-self._left} bytes more than were announced")
        if block.numel():
            self._file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if error is not None:
            return
        if self._left or next(self._order, None) is not None:
            raise ValueError("a tensor that was announced was not written")
        if len(self.shards) > 1:
            weight_map = {name: self._name(index) for index, shard in enumerate(self.shards) for name in shard}
            total = sum(info.nbytes for shard in self.shards for info in shard.values())
            write_json(
                self.directory / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )

    def _name(self, index: int) -> str:
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _open(self, index: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in self.shards[index].items():
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
        self._file = (self.directory / self._name(index)).open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
