"""GRASPrune: scores of MLP units and key-value heads by a straight-through gradient under a budget, then scales.

Wang et al., arXiv 2604.19398; code ZiY-Wang/GRASPrune 666f4f0, gates.py and pipeline.py. In the first `mask_steps` a
gate multiplies by z = m + p - stop_gradient(p), p = sigmoid(s / temperature). The masks m are made anew at each step:
of all units in one ranking by p, the first are kept whose summed parameters fit the budget. A layer's best unit and
its best head are kept in any case, without being paid for. In the `scale_steps` after that the masks stay, and a gate
multiplies by m · (1 + scale_range · tanh(r)), with r from 0. Both train on the cross-entropy alone, by AdamW.

A head's gate multiplies the attention output, which is the same as its values, and its keys before the rotary
embedding, which commutes with it. So a dropped head attends uniformly, and the scale of a kept one changes the
temperature of its softmax. In Qwen3 the norm of the keys follows and cancels their scale, here as there.

Departures: the masks of the second phase are projected onto the budget, each layer's best unit and head included,
where the published ones overshoot it by the units that nobody paid for. The budget is of all parameters of the decoder
layers, also of those that no unit owns. Windows come in order, and the second phase goes on where the first one
stopped; the published code shuffles WikiText-2, its training split in the first phase and its validation split in the
second. The published code folds a head's scale into the weights of its keys and values and not into their biases,
which it multiplied in training; here both get it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvaprune.architecture.parameter_counts import dense_decoder_parameters, dense_unit_costs, sparsity
from tvaprune.architecture.topology import Topology
from tvaprune.distributed import World
from tvaprune.gates.budget import adamw, take_step
from tvaprune.gates.insertion import GatedModel
from tvaprune.gates.objective import Row, average, gradient, objective, row
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import make_scores_match_mask, project
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import UNIT_AXES, Axis
from tvaprune.options.gates import GraspruneOptions


class GraspruneGates:
    """Scores and scales, all by gradient. `target_sparsity` is the share of the decoder layers' parameters to remove.

    Attributes:
        score: s by pruned axis, shapes of `Topology.gate_shape`; higher = keep.
        raw_scale: r by pruned axis, the same shapes.
    """

    def __init__(
        self,
        topology: Topology,
        options: GraspruneOptions,
        target_sparsity: float,
        axes: tuple[Axis, ...],
        device: torch.device,
    ) -> None:
        self.topology, self.options, self.target_sparsity = topology, options, target_sparsity
        self.axes = tuple(axis for axis in UNIT_AXES if axis in axes)
        self.score = {axis: torch.zeros(topology.gate_shape(axis), device=device) for axis in self.axes}
        self.raw_scale = {axis: torch.zeros_like(score) for axis, score in self.score.items()}
        self._score_optimizer = adamw(list(self.score.values()), options.lr)
        self._scale_optimizer = adamw(list(self.raw_scale.values()), options.lr)
        self._final: Masks | None = None

    def start(self, gated: GatedModel, input_ids: Tensor, world: World, progress: bool) -> None:
        """Nothing is measured before the first step."""

    def step(self, gated: GatedModel, input_ids: Tensor, index: int, world: World) -> Row:
        """One step on the scores, or on the scales of the final masks."""
        learns_masks = index < self.options.mask_steps
        trained, optimizer = (
            (self.score, self._score_optimizer) if learns_masks else (self.raw_scale, self._scale_optimizer)
        )
        keep = self.select() if learns_masks else self._final_keep()
        leaves = {axis: value.clone().requires_grad_() for axis, value in trained.items()}
        if learns_masks:
            soft = self._probability(leaves)
            gates = {axis: keep[axis] + (soft[axis] - soft[axis].detach()) for axis in self.axes}
        else:
            gates = {axis: keep[axis] * scale for axis, scale in self._scale(leaves).items()}
        gated.set(gates, self.topology.hidden, self._on_keys(gates))
        loss = objective(gated.model, input_ids)
        loss.backward()
        gradients = [gradient(leaf) for leaf in leaves.values()]
        loss = average(world, loss, gradients)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        take_step(optimizer, gradients, self.options.lr)
        widths = {**Masks.dense(self.topology).widths(), **{axis: mask.sum(-1).cpu() for axis, mask in keep.items()}}
        return row(loss, norm, sparsity(self.topology, widths), self.target_sparsity, widths["hidden"])

    def select(self) -> dict[Axis, Bool[Tensor, "layers units"]]:
        """The units that a step keeps, by pruned axis; of equal ones those of the lower layer, and MLP units first."""
        probability = self._probability(self.score)
        ranked = torch.cat(list(probability.values()), -1)
        costs = dense_unit_costs(self.topology)
        by_axis = [costs[axis].expand(-1, self.topology.width(axis)) for axis in self.axes]
        price = torch.cat(by_axis, -1).to(ranked.device)
        budget = float(price.sum()) - self.target_sparsity * dense_decoder_parameters(self.topology)
        order = torch.sort(ranked.flatten(), descending=True, stable=True).indices
        fits = price.flatten()[order].cumsum(0) <= budget
        keep = torch.zeros_like(ranked, dtype=torch.bool)
        keep.view(-1)[order[fits]] = True
        parts = dict(zip(self.axes, keep.split([self.topology.width(axis) for axis in self.axes], -1), strict=True))
        return {axis: part | (_best(probability[axis]) & ~part.any(-1, keepdim=True)) for axis, part in parts.items()}

    def final_masks(self) -> Masks:
        """Masks by the scores as they are, projected onto the budget; each layer keeps its best unit and head."""
        probability = {axis: soft.cpu() for axis, soft in self._probability(self.score).items()}
        protected = {axis: soft.masked_fill(_best(soft), torch.inf) for axis, soft in probability.items()}
        scores = Masks.dense(self.topology).score | protected
        masks = project(self.topology, scores, self.target_sparsity, self.axes)
        shift = torch.cat([(protected[axis] - masks.score[axis])[protected[axis].isfinite()] for axis in self.axes])[0]
        return make_scores_match_mask(masks.keep, {axis: soft - shift for axis, soft in probability.items()})

    def learned(self) -> tuple[Masks, WeightUpdate]:
        """Masks projected onto the target, and scales of units and of keys; on the CPU."""
        masks = self._final or self.final_masks()
        scale = {axis: each.cpu() for axis, each in self._scale(self.raw_scale).items()}
        none = WeightUpdate.none(self.topology)
        return masks, WeightUpdate({**none.scale, **scale}, {}, self._on_keys(scale))

    def _probability(self, score: dict[Axis, Tensor]) -> dict[Axis, Float[Tensor, "layers units"]]:
        return {axis: torch.sigmoid(each / self.options.temperature) for axis, each in score.items()}

    def _scale(self, raw: dict[Axis, Tensor]) -> dict[Axis, Float[Tensor, "layers units"]]:
        return {axis: 1 + self.options.scale_range * torch.tanh(each) for axis, each in raw.items()}

    def _on_keys(self, gates: dict[Axis, Tensor]) -> dict[Any, Tensor]:
        """A head's gate for each of its channels, where heads are pruned."""
        rows = self.topology.head_dim
        return {"keys": gates["kv_heads"].repeat_interleave(rows, -1)} if "kv_heads" in gates else {}

    def _final_keep(self) -> dict[Axis, Tensor]:
        if self._final is None:
            self._final = self.final_masks()
        return {axis: self._final.keep[axis].to(score.device) for axis, score in self.score.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "raw_scale": self.raw_scale,
            "score_optimizer": self._score_optimizer.state_dict(),
            "scale_optimizer": self._scale_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for axis in self.axes:
            self.score[axis].copy_(state["score"][axis])
            self.raw_scale[axis].copy_(state["raw_scale"][axis])
        self._score_optimizer.load_state_dict(state["score_optimizer"])
        self._scale_optimizer.load_state_dict(state["scale_optimizer"])


def _best(score: Float[Tensor, "layers units"]) -> Bool[Tensor, "layers units"]:
    """The best unit of each layer."""
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.argmax(-1, keepdim=True), True)
