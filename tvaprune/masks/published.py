"""The masks that the paper's authors published: gate parameters in a pickle, read without running what is in it.

The file, from their repository, is a pickled dict of float32 tensors: `hidden_mask_z_mu` and `hidden_mask_z_logD`
[hidden], and for every layer i `inter_layer{i}_z_mu`, `..._logD` [intermediate] and `attn_layer{i}_z_mu`, `..._logD`
[kv_heads]; logD is the log-variance.
"""

import pickle
import pickletools
import warnings
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tvaprune.architecture.topology import Topology
from tvaprune.masks.masks import Masks, log_alpha
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import AXES, Axis

_LARGEST_BYTES = 1_000_000_000  # the authors' file for 7B has 2.7 MB
_NAMES: dict[Axis, str] = {"hidden": "hidden_mask", "intermediate": "inter_layer{}", "kv_heads": "attn_layer{}"}


class PublishedMasksError(ValueError):
    """The file is not the authors' masks, or not of this model."""


def read_published_masks(file: Path, topology: Topology) -> tuple[Masks, WeightUpdate]:
    """Read the authors' gates for a model.

    Keep where log_alpha = log(mu² / sigma²) > 0 (section 3.1), with mu to be folded. Nothing of the pickle is executed
    (`_TensorsOnly`), and the tensors' bytes inside go through torch.load's own allow-list.

    Raises:
        FileNotFoundError: no such file.
        PublishedMasksError: names what the pickle asks for beyond tensors, or the gate whose shape is not the model's.
    """
    content = _unpickle(file)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PublishedMasksError(f"{file}: holds {type(content).__name__}, not a dict of tensors by name")
    mu = {axis: _gates(file, topology, content, axis, "mu") for axis in AXES}
    log_var = {axis: _gates(file, topology, content, axis, "logD") for axis in AXES}
    scores = {axis: log_alpha(mu[axis], log_var[axis]) for axis in AXES}
    return Masks({axis: score > 0 for axis, score in scores.items()}, scores), WeightUpdate(mu)


def _gates(file: Path, topology: Topology, content: dict[str, Tensor], axis: Axis, part: str) -> Tensor:
    """float32, shape of `Topology.gate_shape`."""
    layers = range(topology.layers) if axis != "hidden" else range(1)
    names = [f"{_NAMES[axis].format(layer)}_z_{part}" for layer in layers]
    beyond = f"{_NAMES[axis].format(topology.layers)}_z_{part}"
    if axis != "hidden" and beyond in content:
        raise PublishedMasksError(f"{file}: has {beyond}, but the model has {topology.layers} layers only")
    for name in names:
        found = tuple(content[name].shape) if name in content else None
        if found != (topology.width(axis),):
            shape = "absent" if found is None else f"of shape {list(found)}"
            raise PublishedMasksError(f"{file}: {name} is {shape}, but the model needs [{topology.width(axis)}]")
    rows = [content[name].float() for name in names]
    for name, row in zip(names, rows, strict=True):
        if not bool(row.isfinite().all()):
            raise PublishedMasksError(f"{file}: {name} has a value that is not finite; fetch the file again")
    return rows[0] if axis == "hidden" else torch.stack(rows)


def _unpickle(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the path of the authors' pickle")
    if file.stat().st_size > _LARGEST_BYTES:
        raise PublishedMasksError(f"{file}: larger than {_LARGEST_BYTES:,} bytes, which no masks are")
    content = file.read_bytes()
    with BytesIO(content) as stream:
        try:
            for operation, argument, _ in pickletools.genops(content):
                # Unpickling allocates as many places as the largest number of one.
                if "PUT" in operation.name and int(argument or 0) > len(content):
                    raise PublishedMasksError(f"numbers a value {argument}, in a file of {len(content)} bytes")
            return _TensorsOnly(stream).load()
        except PublishedMasksError as error:
            raise PublishedMasksError(f"{file}: {error}") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise PublishedMasksError(f"{file}: not a pickle of tensors, or damaged ({error})") from error


class _TensorsOnly(pickle.Unpickler):
    """Knows three names, none of them the pickle's own: what is not a plain value or a tensor cannot be made."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        }
        if (module, name) not in known:
            raise PublishedMasksError(f"asks for {module}.{name}, which masks have no use for; it was not run")
        return known[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise PublishedMasksError(f"asks for the persistent object {pid!r}; masks have none")


def _storage(content: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TypedStorage is deprecated, and what the file holds
            return torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise PublishedMasksError(f"a tensor's bytes ask for more than a tensor: {cause.strip()}") from error


def _tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, *_: Any) -> Tensor:
    if hooks:
        raise PublishedMasksError("a tensor has hooks, which are code; they were not run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())
