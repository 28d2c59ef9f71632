"""How the loss curves in each gate, by the Fisher information of the model's own predictions."""

import torch
from torch import Tensor
from tqdm import tqdm

from tvaprune.distributed import ALONE, World
from tvaprune.gates.insertion import GatedModel
from tvaprune.losses import distillation_loss
from tvaprune.model import topology as layout
from tvaprune.model.topology import AXES, Axis


def gate_curvature(
    gated: GatedModel, windows: Tensor, seed: int, progress: bool = True, world: World = ALONE
) -> dict[Axis, Tensor]:
    """The diagonal Fisher information of every gate at 1, per window.

    F = E[(d log p(y) / d z)²] with y sampled from the model itself, summed over a window's tokens before squaring.
    At the dense model it is the Hessian of the distillation loss, so ½·F is what dropping a unit costs to second
    order (optimal brain damage, LeCun et al. 1989; on masks, Kwon et al., NeurIPS 2022). The labels of the text
    itself would add how wrong the model is to how much the unit matters.

    Args:
        gated: with its gates inserted; left clear.
        windows: int64 [n, seq_len], the same on every process, which take turns.

    Returns:
        float32 per axis, >= 0, mean over windows.
    """
    topology = gated.topology
    model = gated.model
    head = layout.head(model).weight.detach()
    # One uniform a token, drawn on the CPU and for all windows, so that a seed gives the same on every device and rank.
    uniform = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed))
    total = {axis: torch.zeros(topology.gate_shape(axis), device=windows.device) for axis in AXES}
    for index, counts in tqdm(world.turns(len(windows)), desc="curvature", disable=not progress):
        window = windows[index]
        ones = {axis: torch.ones_like(total[axis], requires_grad=True) for axis in AXES}
        gated.set(ones, kept_hidden=topology.hidden)
        hidden = layout.decoder(model)(input_ids=window[None], use_cache=False).last_hidden_state[0]
        sampled = _sample(hidden.detach(), head, uniform[index].to(window.device))
        loss = distillation_loss(hidden, head, None, None, sampled).loss * len(window)
        gradients = torch.autograd.grad(loss, [ones[axis] for axis in AXES])
        for axis, gradient in zip(AXES, gradients, strict=True):
            total[axis] += gradient.square() * counts
    gated.clear()
    return {axis: world.sum_(total[axis]) / len(windows) for axis in AXES}


def _sample(hidden: Tensor, head: Tensor, uniform: Tensor, chunk: int = 256) -> Tensor:
    """One next token a position from the model's own distribution: [tokens, width] to int64 [tokens].

    Args:
        uniform: float32 [tokens], where the cumulative distribution is inverted.
    """
    tokens = []
    for rows, at in zip(hidden.split(chunk), uniform.split(chunk), strict=True):
        cumulative = (rows.to(head.dtype) @ head.T).float().softmax(-1).cumsum(-1)
        wanted = at[:, None] * cumulative[:, -1:]
        tokens.append(torch.searchsorted(cumulative, wanted).clamp_max_(cumulative.shape[1] - 1).squeeze(1))
    return torch.cat(tokens)
