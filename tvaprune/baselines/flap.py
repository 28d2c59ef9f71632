"""FLAP: fluctuation of the inputs, with biases in place of what the dropped inputs contributed on average."""

from torch import Tensor

from tvaprune.architecture.topology import layer_modules
from tvaprune.baselines.activations import InputStatistics, column_sums, input_statistics, per_unit, readers
from tvaprune.baselines.allocation import Scores, allocate_global, allocate_uniform
from tvaprune.baselines.problem import Problem
from tvaprune.masks.masks import Masks
from tvaprune.masks.update import WeightUpdate
from tvaprune.options.axes import Axis
from tvaprune.options.baselines import FlapOptions


def flap(problem: Problem, options: FlapOptions) -> tuple[Masks, WeightUpdate]:
    """Var(X_j) · ‖W_:,j‖², z-scored per layer, one threshold over all layers and both axes (An et al., AAAI 2024).

    The published AL-AM structure with the WIFV metric, as in its code (FLAP 3bb57db, lib/prune.py:280-409): every
    input's score is standardised within its layer and module (368), o_proj's squared before (336) and down_proj's not;
    a head's score is the mean of its inputs' (373); the budget is counted in parameters (390). The paper does not
    mention the square, which sets the balance of heads and units. Var is `InputStatistics.fluctuation`. Dropped inputs
    are replaced by their mean: b = W · (mean(X) ⊙ (1 - m)) on o_proj and down_proj (172, 188), `WeightUpdate.bias`.

    Departures: heads are pooled over whole groups; the published code knows no groups. Where the threshold is a
    head that the budget has no room for, units fill the rest; the published code stops at the nearest size (391).

    Raises:
        ValueError: only one window.
    """
    topology = problem.topology
    if len(problem.windows) < 2:
        raise ValueError("learn_masks: flap's fluctuation leaves out the first window, so it needs two or more")
    statistics = input_statistics(problem)
    allocate = allocate_global if options.allocation == "adaptive" else allocate_uniform
    masks = allocate(topology, flap_scores(problem, statistics), problem.target_sparsity)
    return masks, WeightUpdate.none(topology, _mean_inputs(problem, statistics) if options.bias else {})


def flap_scores(problem: Problem, statistics: dict[Axis, InputStatistics]) -> Scores:
    """float32 [layers, units] per pruned axis, mean 0 over a layer."""
    layers = list(layer_modules(problem.model))
    scores: Scores = {}
    for axis in problem.axes:
        metric = statistics[axis].fluctuation * column_sums(layers, axis, lambda w: w.double().square())
        if axis == "kv_heads":
            metric = metric.square()
        standard = (metric - metric.mean(-1, keepdim=True)) / metric.std(-1, keepdim=True)
        scores[axis] = per_unit(problem.topology, axis, standard).mean(-1).float()
    return scores


def _mean_inputs(problem: Problem, statistics: dict[Axis, InputStatistics]) -> dict[str, Tensor]:
    """mean(X) of every module that reads units of a pruned axis: float32 [inputs] by its name, on the CPU."""
    names = {module: name for name, module in problem.model.named_modules()}
    return {
        names[module]: statistics[axis].mean[index].float().cpu()
        for index, layer in enumerate(layer_modules(problem.model))
        for axis, module in readers(layer).items()
        if axis in problem.axes
    }
