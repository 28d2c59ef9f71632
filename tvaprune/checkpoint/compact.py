"""Cut a dense checkpoint down to the kept units, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvaprune.artifacts import write_json
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.update import WeightUpdate, axis_of_dimension, can_stay_tied, fold, per_row
from tvaprune.model.topology import Topology, cut
from tvaprune.widths.masks import Masks

MODELING_FILE = Path(__file__).with_name("modeling_tvaprune.py")
# Files of a model directory that are not copied: weights and their index, and what is written anew.
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "config.json")
_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class CheckpointSize:
    """Parameters and bytes of the tensors written and of the dense ones read; tied tensors count once."""

    parameters_dense: int
    parameters_kept: int
    bytes_dense: int
    bytes_kept: int


def compact(dense: Path, masks: Masks, update: WeightUpdate, out: Path) -> CheckpointSize:
    """Write the pruned model as a Hugging Face directory that carries its own modeling file.

    Kept indices stay sorted, so the order of units, and with it every query head's group, is the dense model's.
    A block without units vanishes with its norm. Weights keep their stored dtype.

    Args:
        dense: the dense model's directory, safetensors.
        masks: keep-masks, True = keep.
        update: folded into the weights before they are cut.
        out: the directory to write.

    Raises:
        FileNotFoundError: the dense directory has no safetensors.
        ValueError: a mask that leaves nothing to compute with.
    """
    config = load_config(dense)
    topology = Topology.of(config)
    if not masks.keep["hidden"].any():
        raise ValueError("masks: no hidden dimension is kept, so there is no model left")
    tied = bool(config.tie_word_embeddings)
    stay_tied = tied and can_stay_tied(masks, update)
    out.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(out)
    parameters_dense = bytes_dense = 0
    for name, tensor in read_tensors(dense):
        if tied and name == "lm_head.weight":
            continue
        parameters_dense += tensor.numel()
        bytes_dense += tensor.nbytes
        if tied and not stay_tied and name == "model.embed_tokens.weight":
            writer.add("lm_head.weight", cut_tensor(topology, name, tensor, masks))
        shrunk = cut_tensor(topology, name, fold(topology, name, tensor, update, tied=stay_tied), masks)
        if shrunk is not None:
            writer.add(name, shrunk)
    for name, bias in _projection_biases(topology, masks, update):
        writer.add(name, bias.to(tensor.dtype))
    writer.finish()
    _write_config(config, dense, topology, masks, stay_tied, bool(update.bias), out)
    copy_companions(dense, out)
    return CheckpointSize(parameters_dense, writer.parameters, bytes_dense, writer.bytes)


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors checkpoint, one at a time, shards in order."""
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{directory}: no .safetensors file; convert the checkpoint to safetensors first")
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def cut_tensor(topology: Topology, name: str, tensor: Tensor, masks: Masks) -> Tensor | None:
    """The rows and columns of the kept units, or None where the whole block is gone."""
    where = cut(name)
    if where.block is not None and where.layer is not None:
        units = masks.keep["kv_heads" if where.block == "attention" else "intermediate"][where.layer]
        if not units.any():
            return None
    for dim, units_name in enumerate(where.dims):
        axis = axis_of_dimension(units_name)
        if axis is None or units_name is None:
            continue
        keep = masks.keep[axis] if axis == "hidden" else masks.keep[axis][where.layer or 0]
        if not keep.all():
            rows = per_row(topology, units_name, keep).nonzero().flatten()
            tensor = tensor.index_select(dim, rows)
    return tensor


def _projection_biases(topology: Topology, masks: Masks, update: WeightUpdate) -> Iterator[tuple[str, Tensor]]:
    """FLAP's biases for every projection: zero where the update has none."""
    if not update.bias:
        return
    for layer in range(topology.layers):
        for projection in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{projection}"
            bias = update.bias.get(name, torch.zeros(topology.hidden))
            yield f"{name}.bias", (bias * update.scale["hidden"])[masks.keep["hidden"]]


def _write_config(
    config: Any, dense: Path, topology: Topology, masks: Masks, tied: bool, projection_bias: bool, out: Path
) -> None:
    base = json.loads((dense / "config.json").read_text())
    carried = {key: base[key] for key in ("dtype", "bos_token_id", "eos_token_id", "pad_token_id") if key in base}
    base = {k: v for k, v in base.items() if k not in ("_name_or_path", "architectures", "auto_map", "dtype")}
    widths = masks.widths()
    write_json(
        out / "config.json",
        {
            "architectures": ["TvaPruneForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_tvaprune.TvaPruneConfig",
                "AutoModelForCausalLM": "modeling_tvaprune.TvaPruneForCausalLM",
            },
            "model_type": "tvaprune",
            "base_model_type": config.model_type,
            **carried,
            "hidden_size": int(widths["hidden"]),
            "intermediate_sizes": widths["intermediate"].tolist(),
            "kv_head_counts": widths["kv_heads"].tolist(),
            "projection_bias": projection_bias,
            "tie_word_embeddings": tied,
            "base_config": base | {"tie_word_embeddings": tied},
        },
    )


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, generation settings and the modeling file: all of a model directory but weights and config."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns(*_NOT_COPIED), dirs_exist_ok=True)
    shutil.copyfile(MODELING_FILE, out / MODELING_FILE.name)


class _ShardWriter:
    """Tensors into shards of at most 5 GB, with the index that transformers reads when there are several."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.parameters = 0
        self.bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None:
            return
        if self._pending and self._pending_bytes + tensor.nbytes > _SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.parameters += tensor.numel()
        self.bytes += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard(index).rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        write_json(
            self.directory / "model.safetensors.index.json",
            {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(weight_map.items()))},
        )

    def _shard(self, index: int) -> Path:
        return self.directory / f"shard-{index}.safetensors"

    def _flush(self) -> None:
        if self._pending:
            save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0
