"""A frozen decoder's layers split over processes, for models that do not fit one device (PyTorch's FSDP2)."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from tvaprune.architecture.topology import decoder, decoder_layers
from tvaprune.distributed import Process


def shard_layers(model: PreTrainedModel, device: torch.device, processes: int) -> PreTrainedModel:
    """Keep 1 / processes of every decoder layer on the device; a layer is whole only while it computes.

    Embedding, final norm and head stay whole on every device: the loss and the gates read them outside of any forward.
    So do parameters that are trained (adapters): they are small, and their gradients are averaged where they are made.
    The model is in host memory, in the dtype to compute in, and changed in place. torch.distributed is initialised.
    """
    mesh = init_device_mesh(device.type, (processes,))
    modules = decoder_layers(model)
    split = {p for module in modules for p in module.parameters() if p.numel() and not p.requires_grad}
    whole = {parameter for parameter in model.parameters() if parameter not in split}
    # The decoder last: one root above the layers, so that a layer is gathered while the one before it computes.
    for module in [*modules, decoder(model)]:
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model


def to_process(model: PreTrainedModel, process: Process) -> PreTrainedModel:
    """The model on the process's device, changed in place: whole, or this process's part of its layers."""
    return shard_layers(model, process.device, process.world.size) if process.sharded else model.to(process.device)
