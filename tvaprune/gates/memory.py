"""How much memory mask learning takes, found without taking it: one step on fake tensors, counted as it allocates."""

from copy import deepcopy
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.topology import GATED_SITES, Site, Topology
from tvaprune.gates.insertion import GatedModel, SquaredGradients
from tvaprune.gates.objective import objective
from tvaprune.gates.paper import pool_size
from tvaprune.losses import counted_as
from tvaprune.options.axes import Axis
from tvaprune.options.gates import GateOptions, GraspruneOptions, PaperOptions

# Value, gradient, and AdamW's two moments.
_COPIES = 4


def training_memory(
    config: PreTrainedConfig,
    options: GateOptions,
    seq_len: int,
    dtype: torch.dtype,
    device_type: str,
    gradient_checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes that `learn_gates` holds on its device at its highest, without the process itself.

    Every tensor of a forward, objective and backward with all gates open is counted from its allocation to its end,
    so what autograd keeps, the loss's chunks and the kernels' own outputs are in it. Not in it: workspaces inside
    kernels and the allocator's fragmentation, to which add a tenth on CUDA.

    Args:
        config: of the dense model; nothing is loaded, and 8B parameters take no more than 8M.
        dtype: of the frozen weights.
        device_type: "cuda" counts the stock attention, "cpu" the one that `learn_gates` puts there.

    Returns:
        weights, gates (with gradients and AdamW's moments; fp32), step (what a step needs beside them), total.
    """
    topology = Topology.of(config)
    with FakeTensorMode(), LiveBytes() as live:
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).requires_grad_(False)
        if device_type == "cpu":
            use_training_attention(model, torch.device("cpu"))
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
            model.train()
        weights = sum(weight.nbytes for weight in model.parameters())
        input_ids = torch.zeros(options.batch_size, seq_len, dtype=torch.int64)
        live.restart()
        with GatedModel(model, topology).inserted() as gated:
            gates, means, step_options = _open_gates(topology, options, seq_len, dtype)
            gated.set(gates, topology.hidden, means, **step_options)
            with counted_as(device_type):
                objective(model, input_ids).backward()
        step = live.highest
    trained = sum(gate.numel() for gate in gates.values())  # and as many scores or log-variances
    trained = 2 * trained + sum(mean.numel() for mean in means.values())
    if isinstance(options, PaperOptions):
        step += pool_size(topology, seq_len) * dtype.itemsize
    parts = {"weights": weights, "gates": 4 * _COPIES * trained, "step": step}
    return {**parts, "total": sum(parts.values())}


def _open_gates(
    topology: Topology, options: GateOptions, seq_len: int, dtype: torch.dtype
) -> tuple[dict[Axis, Tensor], dict[Site, Tensor], dict[str, Any]]:
    """Gates and channel means at 1, and what else `GatedModel.set` gets in a step."""
    gates = {axis: torch.ones(topology.gate_shape(axis), requires_grad=True) for axis in options.axes}
    if isinstance(options, GraspruneOptions):
        return gates, {"keys": gates["kv_heads"].repeat_interleave(topology.head_dim, -1)}, {}
    if isinstance(options, PaperOptions):

        def sample(axis: Axis, layer: int, site: Site | None, gate: Tensor, shape: torch.Size) -> Tensor:
            return torch.addcmul(gate.to(dtype), torch.empty(shape, dtype=dtype), gate.to(dtype))

        return gates, {}, {"sample": sample}
    sites = GATED_SITES if options.channel_means else ()
    means = {site: torch.ones(topology.site_shape(site), requires_grad=True) for site in sites}
    if options.ablation == "deterministic":
        return gates, means, {}
    squares = SquaredGradients(topology, options.curvature_tokens or seq_len, torch.device("cpu"))
    return gates, means, {"squares": squares}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and nobody has let go, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """Count from here: what lives already is not seen again."""
        self._seen: set[int] = getattr(self, "_seen", set())
        self._now = self.highest = 0
        self._epoch = getattr(self, "_epoch", 0) + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self._now += size
        self.highest = max(self.highest, self._now)
        finalize(storage, self._gone, key, size, self._epoch)

    def _gone(self, key: int, size: int, epoch: int) -> None:
        self._seen.discard(key)
        if epoch == self._epoch:
            self._now -= size
