"""Read and write safetensors a block of rows at a time, so that memory does not grow with the model.

The safetensors library writes files only from tensors in memory, and what it has read of a mapped file counts as
resident. Here a file is opened anew for each block, and written after its header. The format is 8 bytes of length, a
JSON header, and the tensors' bytes one after another (https://huggingface.co/docs/safetensors, "Format").
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tvaprune.artifacts import check_header, write_json
from tvaprune.progress import SHOWN_AFTER_S, Progress

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "fetch the model again"
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
    """The tensors of a model directory's safetensors files by name, in the files' order."""

    info: dict[str, TensorInfo]
    _files: dict[str, Path]

    @classmethod
    def of(cls, directory: Path) -> "Checkpoint":
        """Read the headers.

        Raises:
            ValueError: no safetensors, as pickles are not read; a file that is absent or damaged; or a dtype that is
                not floating point of at least 16 bits. The message names the file.
        """
        info: dict[str, TensorInfo] = {}
        files: dict[str, Path] = {}
        for shard in _shards(directory):
            try:
                check_header(shard)
                with safe_open(shard, framework="pt") as file:
                    slices = {name: file.get_slice(name) for name in file.offset_keys()}
                    described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            except FileNotFoundError as error:
                raise ValueError(f"{shard}: no such file, but {_INDEX} names it; {_AGAIN}") from error
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{shard}: damaged safetensors file ({error}); {_AGAIN}") from error
            for name, (shape, code) in described.items():
                if code not in _DTYPES:
                    raise ValueError(f"{shard}: {name} is stored as {code}; use a model in {', '.join(_DTYPES)}")
                info[name], files[name] = TensorInfo(shape, _DTYPES[code]), shard
        return cls(info, files)

    def read(self, name: str) -> Tensor:
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


def _shards(directory: Path) -> list[Path]:
    """The files that transformers reads: a directory can hold the same weights a second time, under other names."""
    single, index = directory / _SINGLE, directory / _INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{index}: damaged: {error}; {_AGAIN}") from error
        weights = content.get("weight_map") if isinstance(content, dict) else None
        names = list(weights.values()) if isinstance(weights, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index}: has no weight_map of tensors to files beside it; {_AGAIN}")
        return [directory / name for name in sorted(set(names))]
    if pickled := sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in directory.glob(pattern)):
        raise ValueError(f"{directory}: {pickled[0]} is a pickle, which can run code; convert the model to safetensors")
    raise ValueError(f"{directory}: no {_SINGLE}; {_AGAIN}")


def write_checkpoint(
    directory: Path, tensors: dict[str, TensorInfo], blocks: Callable[[str], Iterable[Tensor]], progress: str
) -> None:
    """Write model.safetensors, or several shards with the index that transformers reads, in the tensors' order.

    The directory exists. `blocks` gives the rows of the tensor of a name, in the announced dtype. A file holds at most
    SHARD_BYTES, unless one tensor is larger.

    Raises:
        ValueError: a tensor's blocks are not of the announced size: a bug, not a user's mistake.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda info: info.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    total = sum(info.nbytes for info in tensors.values())
    with Progress(desc=progress, total=total, unit="B", unit_scale=True, delay=SHOWN_AFTER_S) as bar:
        for name, names in split.filename_to_tensors.items():
            with (directory / name).open("wb") as file:
                file.write(_header({tensor: tensors[tensor] for tensor in names}))
                for tensor in names:
                    info, written = tensors[tensor], 0
                    for block in blocks(tensor):
                        if block.numel():
                            file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
                        written += block.nbytes
                        bar.update(block.nbytes)
                    if written != info.nbytes:
                        raise ValueError(f"tensor {tensor!r}: {written} bytes came, {info.nbytes} were announced")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(directory / _INDEX, index)


def _header(shard: dict[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in shard.items():
        offsets = [offset, offset + info.nbytes]
        header[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    return struct.pack("<Q", len(encoded)) + encoded
