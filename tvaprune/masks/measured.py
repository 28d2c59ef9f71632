"""Widths by a measured table: the most importance within a budget, and of what keeps as much, the fastest.

Every layer chooses one width of each block out of those that were timed, which makes a multiple-choice knapsack: some
thousand binary variables and one or two sums, solved to the optimum by HiGHS. Hidden is one choice for all layers, so
the program is solved for each of its widths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from tvaprune.architecture.parameter_counts import decoder_parameters, dense_decoder_parameters
from tvaprune.architecture.topology import Axis, Topology
from tvaprune.masks.adapt import Layout
from tvaprune.masks.importance import SLOPE, lost_by_width
from tvaprune.masks.latency_table import LATENCIES, Latency, LatencyTable
from tvaprune.masks.masks import Masks
from tvaprune.masks.projection import keep_best

# A prediction is right to a few percent, and a latency asked for is a ceiling: aim so far below it.
AIM = 0.95
# What is traded for speed keeps the parameters to this share, so that the result compares with other ways to round.
SAME_PARAMETERS = 0.995
# HiGHS meets a sum to about 1e-6; where it oversteps, it is asked again with a limit so much lower.
_MARGIN = 2e-6
# Near-ties are countless, and proving the last digit of them takes for ever: how far the found may be from the proven,
# and how long to try. Importance is learned and latency measured to fewer digits.
_GAP = {"lost": 1e-4, "latency_ms": 1e-3}
_SECONDS = 5.0
_ROUNDING = 1e-9  # of sums, relative


def adapt_measured(
    topology: Topology,
    masks: Masks,
    table: LatencyTable,
    of: Latency,
    layout: Layout,
    target_sparsity: float,
    latency_target: float | None,
    slack: float,
) -> Masks:
    """Resize the masks to widths of the table: within the parameters, or, where given, within a share of latency."""
    if latency_target is None:
        chosen = widths_within_parameters(topology, masks, table, of, layout, target_sparsity, slack)
    else:
        chosen = widths_within_latency(topology, masks, table, of, layout, latency_target)
    return keep_chosen(masks, chosen)


def latency_metrics(topology: Topology, table: LatencyTable, masks: Masks, layout: Layout) -> dict[str, Any]:
    """What the table predicts for the masks' widths: milliseconds, and the share of the dense model's, by phase."""
    widths = masks.widths()
    intermediate, kv_heads = widths["intermediate"].tolist(), widths["kv_heads"].tolist()
    if layout == "padded":
        intermediate, kv_heads = ([max(counts)] * topology.layers for counts in (intermediate, kv_heads))
    metrics: dict[str, Any] = {
        "profile_threads": table.made_on["threads"],
        "profile_is_cuda": int(table.made_on["device"] != "cpu"),
    }
    for of in LATENCIES:
        dense = table.dense(of, topology)
        latency = table.predict(of, int(widths["hidden"]), intermediate, kv_heads)
        metrics[of] = {"predicted_ms": latency, "predicted_dense_ms": dense, "predicted_share": latency / dense}
    return metrics


class Chosen(NamedTuple):
    """Widths of a model, one a layer but for hidden, and what they cost.

    Attributes:
        lost: importance of the units that they leave out.
        parameters: of the decoder layers.
        latency_ms: predicted.
    """

    hidden: int
    intermediate: list[int]
    kv_heads: list[int]
    lost: float
    parameters: float
    latency_ms: float


def widths_within_parameters(
    topology: Topology,
    masks: Masks,
    table: LatencyTable,
    of: Latency,
    layout: Layout,
    target_sparsity: float,
    slack: float,
) -> Chosen:
    """The fastest of the widths that lose hardly more than the least possible within the parameters.

    First the least that any widths of the table lose within the budget; then, of those that lose no more than
    (1 + slack) times that with as good as the same parameters and the same heads, the ones of the lowest predicted
    latency. Whatever rounding of the masks to multiples of the table's steps meets the budget is among the
    candidates, so none loses less, and none that is within the slack, with those heads, is faster.

    Heads stay, because they are slow and the importance of units that gates have just decided on is nearly the same: by
    importance alone they would go for MLP units, and perplexity says otherwise (lab log).

    A padded model computes its widest layer in every layer, so there the first step alone counts.

    Args:
        slack: share of the least loss that may be added for speed.

    Raises:
        ValueError: no widths of the table meet the budget.
    """
    budget = (1 - target_sparsity) * dense_decoder_parameters(topology)
    for programs in _programs(topology, masks, table, of, layout):
        least = [(program, program.least("lost", {"parameters": (0, budget)})) for program in programs]
        found = [(program, chosen) for program, chosen in least if chosen and _fits(topology, chosen, layout)]
        if not found:
            continue
        best = min((chosen for _, chosen in found), key=lambda chosen: chosen.lost)
        if layout == "padded":
            return best
        limit = (1 + slack) * (1 + _ROUNDING) * best.lost
        limits = {
            "lost": (0.0, limit),
            "parameters": (SAME_PARAMETERS * best.parameters, budget),
        }
        fast = [
            program.only(program.with_heads(best.kv_heads)).least("latency_ms", limits)
            for program, chosen in found
            if chosen.lost <= limit
        ]
        return min([best, *(chosen for chosen in fast if chosen)], key=lambda chosen: chosen.latency_ms)
    raise ValueError(
        f"sparsity = {target_sparsity}: no widths that profile_hardware timed meet it; "
        "lower profile_hardware.intermediate_step or profile_hardware.narrowest_hidden"
    )


def widths_within_latency(
    topology: Topology, masks: Masks, table: LatencyTable, of: Latency, layout: Layout, latency_target: float
) -> Chosen:
    """The widths that lose least of those predicted to take no more than a share of the dense model's latency.

    Aims at AIM times the share, so that the measured latency stays below it. The parameters follow; layers that need
    not be alike keep the masks' heads, if any widths of the MLPs are fast enough then. A padded model is as slow as
    its widest layer in every layer, so all are equally wide there.

    Raises:
        ValueError: the table has no widths so fast.
    """
    dense = table.dense(of, topology)
    ceiling = AIM * latency_target * dense
    fastest = dense
    heads = masks.keep["kv_heads"].sum(-1).tolist()
    for programs in _programs(topology, masks, table, of, "uniform" if layout == "padded" else layout):
        as_learned = [program.only(program.with_heads(heads)) for program in programs] if layout == "uneven" else []
        for choices in (as_learned, programs):
            found = [program.least("lost", {"latency_ms": (0, ceiling)}) for program in choices]
            if chosen := [each for each in found if each is not None]:
                return min(chosen, key=lambda each: each.lost)
        fastest = min([fastest, *(program.fastest() for program in programs)])
    raise ValueError(
        f"adapt_dimensions.latency_target = {latency_target}: the narrowest widths that profile_hardware timed take "
        f"{fastest / dense / AIM:.2f} of the dense model's {of} latency; raise it, or lower "
        "profile_hardware.narrowest_hidden"
    )


def _fits(topology: Topology, chosen: Chosen, layout: Layout) -> bool:
    """Whether a config for all layers alike can say so: the hidden width goes with the most heads that a layer has."""
    return layout == "uneven" or chosen.hidden % topology.hidden_divisor(max(1, *chosen.kv_heads)) == 0


def keep_chosen(masks: Masks, chosen: Chosen) -> Masks:
    """Every vector's best units, as many as were chosen."""

    def by_layer(axis: Axis, counts: list[int]) -> torch.Tensor:
        return torch.stack([keep_best(score, n) for score, n in zip(masks.score[axis], counts, strict=True)])

    return masks.with_keep(
        {
            "hidden": keep_best(masks.score["hidden"], chosen.hidden),
            "intermediate": by_layer("intermediate", chosen.intermediate),
            "kv_heads": by_layer("kv_heads", chosen.kv_heads),
        }
    )


@dataclass(frozen=True)
class _Program:
    """Choices at one hidden width. A group takes exactly one choice, and all layers of a group take it alike.

    Attributes:
        group, width, lost, parameters, latency_ms: [choices]; first the attention groups, then as many MLP groups.
        fixed: lost, parameters and latency_ms of the hidden width itself.
        layers: of each group.
        groups: however many choices are left of each.
    """

    hidden: int
    group: np.ndarray
    width: np.ndarray
    lost: np.ndarray
    parameters: np.ndarray
    latency_ms: np.ndarray
    fixed: dict[str, float]
    layers: int
    groups: int

    def least(self, objective: str, limits: dict[str, tuple[float, float]]) -> Chosen | None:
        """The choices of the lowest sum that keep other sums between limits; None if there are none."""
        within = {name: (low - self.fixed[name], high - self.fixed[name]) for name, (low, high) in limits.items()}
        smaller = self._without_hopeless(objective, within)
        if smaller is None:
            return None
        found = None
        for margin in (0.0, _MARGIN):
            found = smaller._solve(objective, {n: (low, high * (1 - margin)) for n, (low, high) in within.items()})
            if found is None or all(getattr(smaller, n)[found].sum() <= high for n, (_, high) in within.items()):
                break
        return None if found is None else smaller._chosen(found)

    def fastest(self) -> float:
        """The lowest latency that any choices have; infinite without any."""
        if not self._has_choices():
            return float("inf")
        return self.fixed["latency_ms"] + sum(self.latency_ms[self.group == g].min() for g in np.unique(self.group))

    def with_heads(self, counts: list[int]) -> np.ndarray:
        """Choices of the MLPs, and of each layer's attention the one with so many heads: bool [choices]."""
        attention = self.group < self.groups // 2
        by_group = np.array(counts)[:: self.layers]
        return ~attention | (self.width == np.concatenate([by_group, by_group])[self.group])

    def only(self, which: np.ndarray) -> "_Program":
        names = ("group", "width", "lost", "parameters", "latency_ms")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    def _without_hopeless(self, objective: str, limits: dict[str, tuple[float, float]]) -> "_Program | None":
        """Without the choices that alone break a limit, or lose more than some solution in sum.

        So what is left has one scale: importance as such spans e^50, which no solver resolves.
        """
        possible = np.ones(len(self.group), dtype=bool)
        for name, (_, high) in limits.items():
            possible &= getattr(self, name) <= high
        if objective == "lost":
            [(name, (_, high))] = limits.items()
            possible &= self.lost <= self._lost_by_some_solution(getattr(self, name), high)
        smaller = self.only(possible)
        return smaller if smaller._has_choices() else None

    def _has_choices(self) -> bool:
        """Whether every group has one left."""
        return len(np.unique(self.group)) == self.groups

    def _lost_by_some_solution(self, cost: np.ndarray, high: float) -> float:
        """By the cheapest choices that lose no more than x each, for the least x at which they fit; -inf: none do."""
        cheapest: dict[int, int] = {}
        for index in np.argsort(self.lost, kind="stable").tolist():
            group = int(self.group[index])
            if group not in cheapest or cost[index] < cost[cheapest[group]]:
                cheapest[group] = index
                taken = list(cheapest.values())
                if len(taken) == self.groups and cost[taken].sum() <= high:
                    return float(self.lost[taken].sum())
        return -np.inf

    def _solve(self, objective: str, limits: dict[str, tuple[float, float]]) -> np.ndarray | None:
        choices = np.arange(len(self.group))
        constraints = [LinearConstraint(csr_array((np.ones(len(choices)), (self.group, choices))), 1, 1)]
        tiny = np.finfo(float).tiny
        for name, (low, high) in limits.items():
            scale = max(high, tiny)
            constraints.append(LinearConstraint(getattr(self, name)[None] / scale, low / scale, high / scale))
        values = getattr(self, objective)
        result = milp(
            values / max(values.max(), tiny),
            constraints=constraints,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP[objective], "time_limit": _SECONDS},
        )
        return None if result.x is None else result.x > 0.5

    def _chosen(self, which: np.ndarray) -> Chosen:
        widths = np.repeat(self.width[which][np.argsort(self.group[which])], self.layers).tolist()
        layers = len(widths) // 2
        sums = {name: float(getattr(self, name)[which].sum()) + own for name, own in self.fixed.items()}
        return Chosen(self.hidden, widths[layers:], widths[:layers], **sums)


def _programs(
    topology: Topology, masks: Masks, table: LatencyTable, of: Latency, layout: Layout
) -> Iterator[list[_Program]]:
    """First with what the masks left whole kept whole, and no block dropped that they keep; then with every choice.

    One program for each hidden width and, where a config for all layers alike ties that to the number of heads, for
    each of these too.
    """
    whole = bool(masks.keep["hidden"].all())
    for every in (False, True):
        programs = []
        for row, hidden in enumerate(table.hidden):
            if whole and not every and hidden < topology.hidden:
                continue
            program = _program(topology, masks, table, of, row, merged=layout == "uniform")
            if not every:
                program = program.only(_as_the_masks(topology, masks, program))
            if layout == "uneven":
                programs.append(program)
                continue
            attention = program.group < program.groups // 2
            for heads in range(1, topology.kv_heads + 1):
                if hidden % topology.hidden_divisor(heads) == 0:
                    allowed = program.width == heads if layout == "uniform" else program.width <= heads
                    mlp = ~attention & ((program.width > 0) | (layout == "padded"))
                    programs.append(program.only(mlp | (attention & allowed)))
        yield programs


def _program(topology: Topology, masks: Masks, table: LatencyTable, of: Latency, row: int, merged: bool) -> _Program:
    """All choices at one hidden width; merged: one group of all attentions and one of all MLPs."""
    hidden = table.hidden[row]
    layers, groups = (topology.layers, 1) if merged else (1, topology.layers)
    rest, attention, mlp = table.parts(of)
    parts: dict[str, list[np.ndarray]] = {"width": [], "lost": [], "parameters": [], "latency_ms": []}
    blocks: tuple[tuple[Axis, list[int], torch.Tensor], ...] = (
        ("kv_heads", table.kv_heads, attention[row]),
        ("intermediate", table.intermediate, mlp[row]),
    )
    for axis, widths, latency in blocks:
        lost = lost_by_width(topology, masks, axis, SLOPE)[:, widths]
        own = [_parameters(topology, hidden, **{axis: n}) - _parameters(topology, hidden) for n in widths]
        parts["width"].append(np.tile(widths, groups))
        parts["lost"].append((lost.sum(0, keepdim=True) if merged else lost).flatten().numpy())
        parts["parameters"].append(layers * np.tile(own, groups))
        parts["latency_ms"].append(layers * np.tile(latency.numpy(), groups))
    sizes = np.repeat([len(table.kv_heads), len(table.intermediate)], groups)
    return _Program(
        hidden,
        group=np.repeat(np.arange(2 * groups), sizes),
        **{name: np.concatenate(found) for name, found in parts.items()},
        fixed={
            "lost": float(lost_by_width(topology, masks, "hidden", SLOPE)[0, hidden]),
            "parameters": topology.layers * _parameters(topology, hidden),
            "latency_ms": float(rest[row]),
        },
        layers=layers,
        groups=2 * groups,
    )


def _parameters(topology: Topology, hidden: int, intermediate: int = 0, kv_heads: int = 0) -> float:
    """Of one layer."""
    return float(
        decoder_parameters(topology, torch.tensor(hidden), torch.tensor([intermediate]), torch.tensor([kv_heads]))
    )


def _as_the_masks(topology: Topology, masks: Masks, program: _Program) -> np.ndarray:
    """Choices that keep an axis whole that the masks do, and each block that they do: bool [choices]."""
    groups = program.groups // 2
    allowed = np.ones(len(program.group), dtype=bool)
    axes: tuple[Axis, ...] = ("kv_heads", "intermediate")
    for index, axis in enumerate(axes):
        of_axis = program.group // groups == index
        keep = masks.keep[axis]
        if keep.all():
            allowed &= ~of_axis | (program.width == topology.width(axis))
        present = keep.any(-1).numpy() if groups > 1 else np.array([True])
        allowed &= ~of_axis | (program.width > 0) | ~present[program.group % groups]
    return allowed
