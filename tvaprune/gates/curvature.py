"""How the loss curves in each gate, by the Fisher information of the model's own predictions."""

import torch
from torch import Tensor
from tqdm import tqdm

from tvaprune.gates.insertion import GatedModel
from tvaprune.losses import distillation_loss
from tvaprune.model import topology as layout
from tvaprune.model.topology import AXES, Axis


def gate_curvature(gated: GatedModel, windows: Tensor, seed: int, progress: bool = True) -> dict[Axis, Tensor]:
    """The diagonal Fisher information of every gate at 1, per window.

    F = E[(d log p(y) / d z)²] with y sampled from the model itself, summed over a window's tokens before squaring.
    At the dense model it is the Hessian of the distillation loss, so ½·F is what dropping a unit costs to second
    order (optimal brain damage, LeCun et al. 1989; on masks, Kwon et al., NeurIPS 2022). The labels of the text
    itself would add how wrong the model is to how much the unit matters.

    Args:
        gated: with its gates inserted; left clear.
        windows: int64 [n, seq_len].

    Returns:
        float32 per axis, >= 0, mean over windows.
    """
    topology = gated.topology
    model = gated.model
    head = layout.head(model).weight.detach()
    generator = torch.Generator().manual_seed(seed)
    total = {axis: torch.zeros(topology.gate_shape(axis), device=windows.device) for axis in AXES}
    for window in tqdm(windows.unbind(), desc="curvature", disable=not progress):
        ones = {axis: torch.ones_like(total[axis], requires_grad=True) for axis in AXES}
        gated.set(ones, kept_hidden=topology.hidden)
        hidden = layout.decoder(model)(input_ids=window[None], use_cache=False).last_hidden_state[0]
        sampled = _sample(hidden.detach(), head, generator)
        loss = distillation_loss(hidden, head, None, None, sampled).loss * len(window)
        gradients = torch.autograd.grad(loss, [ones[axis] for axis in AXES])
        for axis, gradient in zip(AXES, gradients, strict=True):
            total[axis] += gradient.square()
    gated.clear()
    return {axis: total[axis] / len(windows) for axis in AXES}


def _sample(hidden: Tensor, head: Tensor, generator: torch.Generator, chunk: int = 256) -> Tensor:
    """One next token a position from the model's own distribution: [tokens, width] to int64 [tokens].

    By inverting the cumulative distribution at one uniform a token, drawn on the CPU, so that a seed gives the
    same draws on every device.
    """
    tokens = []
    for rows in hidden.split(chunk):
        cumulative = (rows.to(head.dtype) @ head.T).float().softmax(-1).cumsum(-1)
        uniform = torch.rand(len(rows), 1, generator=generator).to(cumulative.device) * cumulative[:, -1:]
        tokens.append(torch.searchsorted(cumulative, uniform).clamp_max_(cumulative.shape[1] - 1).squeeze(1))
    return torch.cat(tokens)
