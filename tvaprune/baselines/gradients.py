"""Weight gradients of frozen weights, by hooks: what a first-order score needs, without a gradient per parameter.

The weights stay frozen, so autograd keeps no gradient of them. Hooks see each module's input x, output y and the
gradient gy of its output, from which for y = Wx + b
    Σ_i W_ij·∂L/∂W_ij over column j            = Σ_t x_tj · (Wᵀ gy_t)_j
    Σ_j W_ij·∂L/∂W_ij + b_i·∂L/∂b_i over row i = Σ_t y_ti · gy_ti
and, where single elements matter, ∂L/∂W = Σ_t gy_t x_tᵀ, one matrix at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tvaprune.architecture.topology import EMBEDDING, FINAL_NORM, HEAD, cut, decoder_layers, embedding, lm_head
from tvaprune.baselines.allocation import Scores
from tvaprune.baselines.problem import Problem
from tvaprune.losses import next_token_labels
from tvaprune.options.axes import Axis
from tvaprune.options.baselines import Objective

# One value for each row or column that a unit owns, by parameter name and dimension (0 rows, 1 columns).
Products = dict[tuple[str, int], Float[Tensor, " length"]]


class Seen(NamedTuple):
    """What one module did in one window: its input x, output y and the objective's gradient with respect to y."""

    name: str  # of its weight, as in a checkpoint
    module: Any
    x: Tensor  # [tokens, in], or token ids int64 [tokens] for the embedding
    y: Float[Tensor, "tokens out"]
    gradient: Float[Tensor, "tokens out"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the context lasts."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def watched(model: nn.Module, names: set[str], observe: Callable[[Seen], None]) -> Iterator[None]:
    """Call `observe` in each backward with what the modules that own these weights did.

    Memory: inputs and outputs of the watched modules are kept until the backward reaches them.
    """

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, out: Tensor) -> None:
            x, y = args[0].detach().flatten(0, 1), out.detach().flatten(0, 1)
            out.register_hook(lambda g: observe(Seen(name, module, x, y, g.detach().flatten(0, 1))))

        return after

    with ExitStack() as hooks, frozen(model), torch.enable_grad():
        # With all weights frozen, the embedding's output is what the backward starts from.
        hooks.enter_context(embedding(model).register_forward_hook(lambda _, args, out: out.requires_grad_()))
        for module_name, module in model.named_modules():
            if f"{module_name}.weight" in names:
                hooks.enter_context(module.register_forward_hook(hook(f"{module_name}.weight")))
        yield


def owned_weights(model: nn.Module, axes: tuple[Axis, ...]) -> list[str]:
    """Names of the module weights in which a unit of the axes owns rows or columns; lm_head last, tied or not."""
    names = [f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "weight")]
    return [name for name in names if any(axis in axes for axis in cut(name).axes)]


def signed_products(problem: Problem) -> Products:
    """Σ w·∂L/∂w over each row (with its bias) and column, L the mean cross-entropy over all windows; float64.

    The products of a tied head are added to the embedding's.
    """
    model, axes = problem.model, problem.axes
    products: Products = {}

    def add(name: str, dim: int, values: Tensor) -> None:
        products[name, dim] = products.get((name, dim), 0) + values.double()

    def observe(seen: Seen) -> None:
        gradient = seen.gradient.float()
        along_rows = (gradient * seen.y.float()).sum(0)
        if isinstance(seen.module, nn.Linear):
            rows, columns = cut(seen.name).axes
            if rows in axes:
                add(seen.name, 0, along_rows)
            if columns in axes:
                back = (seen.gradient @ seen.module.weight).float()
                add(seen.name, 1, (seen.x.float() * back).sum(0))
        else:
            # An embedding's column or a norm's weight: its product is seen at the output.
            add(seen.name, len(cut(seen.name).dims) - 1, along_rows)
        if seen.name == FINAL_NORM:
            # The head reads the norm's output h: Σ over its column of w·∂L/∂w = Σ_t h·∂L/∂h.
            add(_head_parameter(model), 1, along_rows)

    with watched(model, set(owned_weights(model, axes)) - {HEAD}, observe):
        for window in problem.each_window("gradients"):
            (problem.loss(window) / len(problem.windows)).backward()
    return products


def absolute_products(problem: Problem, objective: Objective, layers_at_once: int | None = None) -> Products:
    """Σ abs(w·g) over each row and column, g the gradient of the mean objective over all windows; float32.

    A tied head is counted with the embedding.

    Args:
        objective: "loss", the cross-entropy; "logits", the mean over the vocabulary of each token's largest logit in
            the window.
        layers_at_once: layers whose full gradients (fp32) are in memory together; the windows run once for each
            such group. None = all.
    """
    layers = len(decoder_layers(problem.model))
    step = layers_at_once or layers
    owned = owned_weights(problem.model, problem.axes)
    parameters = dict(problem.model.named_parameters(remove_duplicate=False))
    products: Products = {}
    for first in range(0, layers, step):
        # The tensors of the whole model go with the first layers.
        group = {name for name in owned if (cut(name).layer or 0) in range(first, first + step)}
        for name, gradient in _full_gradients(problem, group, objective).items():
            product = gradient.mul_(parameters[name].detach().float()).abs_()
            for dim, axis in enumerate(cut(name).axes):
                if axis in problem.axes:
                    products[name, dim] = product if product.dim() == 1 else product.sum(1 - dim)
    return products


def pool(problem: Problem, products: Products) -> Scores:
    """Sum what each unit owns over rows, columns and matrices: float32 per pruned axis, shapes of gates."""
    topology = problem.topology
    scores: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in problem.axes}
    for (name, dim), values in products.items():
        where = cut(name)
        axis = where.axes[dim]
        if axis in scores:
            pooled = values.float().cpu().view(topology.width(axis), -1).sum(1)
            scores[axis][... if axis == "hidden" else where.layer] += pooled
    return scores


def _full_gradients(problem: Problem, names: set[str], objective: Objective) -> dict[str, Tensor]:
    """∂/∂W of the mean objective: float32 by parameter name, biases of the named weights too."""
    model = problem.model
    gradients: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient.float()

    def observe(seen: Seen) -> None:
        g, weight = seen.gradient.float(), seen.module.weight.detach()
        if isinstance(seen.module, nn.Linear):
            add(seen.name, g.T @ seen.x.float())
            if seen.module.bias is not None:
                add(seen.name.removesuffix("weight") + "bias", g.sum(0))
        elif isinstance(seen.module, nn.Embedding):
            if seen.name not in gradients:
                gradients[seen.name] = torch.zeros_like(weight, dtype=torch.float32)
            gradients[seen.name].index_add_(0, seen.x, g)
        else:
            # A norm's output is weight · normed input; where the weight is 0, so is the product asked for.
            add(seen.name, ((g * seen.y.float()).sum(0) / weight.float()).nan_to_num_(0, 0, 0))

    head = lm_head(model).weight.detach()
    share = 1 / len(problem.windows)
    with watched(model, names - {HEAD}, observe):
        for window in problem.each_window("gradients"):
            hidden = problem.forward(window)
            labels = next_token_labels(window)
            on_hidden, on_head = _objective_gradients(hidden.detach(), head, labels, objective, HEAD in names)
            if on_head is not None:
                add(_head_parameter(model), on_head.mul_(share))
            hidden.backward((on_hidden * share).to(hidden.dtype))
    return gradients


def _head_parameter(model: nn.Module) -> str:
    """The name under which the head's weight counts: the embedding's where the two are tied."""
    return EMBEDDING if lm_head(model).weight is embedding(model).weight else HEAD


def _objective_gradients(
    hidden: Float[Tensor, "tokens width"],
    head: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " tokens"],
    objective: Objective,
    want_head: bool,
) -> tuple[Float[Tensor, "tokens width"], Float[Tensor, "vocab width"] | None]:
    """Gradients of one window's objective with respect to hidden states and, if wanted, the head: float32."""
    on_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    on_head = torch.zeros_like(head, dtype=torch.float32) if want_head else None
    if objective == "logits":
        peak = torch.cat([(hidden @ rows.T).float().argmax(0) for rows in head.split(8192)])
        on_hidden.index_add_(0, peak, head.float() / len(head))
        return on_hidden, None if on_head is None else on_head.add_(hidden[peak].float() / len(head))
    counted = (labels >= 0).sum()
    for rows, target, out in zip(hidden.split(128), labels.split(128), on_hidden.split(128), strict=True):
        on_logits = (rows @ head.T).float().softmax(-1)
        on_logits.scatter_add_(1, target.clamp_min(0)[:, None], torch.full_like(on_logits[:, :1], -1))
        on_logits *= ((target >= 0) / counted)[:, None]
        out.copy_(on_logits.to(head.dtype) @ head)
        if on_head is not None:
            on_head.addmm_(on_logits.T, rows.float())
    return on_hidden, on_head
