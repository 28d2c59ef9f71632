"""Weight gradients of frozen weights, by hooks: what a first-order score needs, without a gradient per parameter.

The weights stay frozen, so autograd keeps no gradient of them. Hooks see each module's input x, output y and the
gradient gy of its output, from which for y = Wx + b
    Σ_i W_ij·∂L/∂W_ij over column j            = Σ_t x_tj · (Wᵀ gy_t)_j
    Σ_j W_ij·∂L/∂W_ij + b_i·∂L/∂b_i over row i = Σ_t y_ti · gy_ti
and, where single elements matter, ∂L/∂W = Σ_t gy_t x_tᵀ, one matrix at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tvaprune.architecture.topology import AXES, Axis, Topology, Units, cut, decoder, embedding, layer_modules, lm_head
from tvaprune.baselines.allocation import Scores
from tvaprune.losses import cross_entropy, next_token_labels

Objective = Literal["loss", "logits"]

AXIS_OF_UNITS: dict[Units, Axis] = {
    "hidden": "hidden",
    "intermediate": "intermediate",
    "query": "kv_heads",
    "kv": "kv_heads",
}
_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Seen:
    """What one module did in one window.

    Attributes:
        name: of its weight, as in a checkpoint.
        module: with its weight, and bias if any.
        x: input; [tokens, in], or token ids int64 [tokens] for the embedding.
        y: output [tokens, out].
        gradient: of the objective with respect to y, [tokens, out].
    """

    name: str
    module: Any
    x: Tensor
    y: Tensor
    gradient: Tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient while the context lasts."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@contextmanager
def watched(model: nn.Module, names: set[str], observe: Callable[[Seen], None]) -> Iterator[None]:
    """Call `observe` in each backward with what the modules that own these weights did; embeddings ask for gradients.

    Memory: inputs and outputs of the watched modules live until the backward reaches them.
    """
    handles = []

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, out: Tensor) -> None:
            x, y = args[0].detach().flatten(0, 1), out.detach().flatten(0, 1)
            out.register_hook(lambda g: observe(Seen(name, module, x, y, g.detach().flatten(0, 1))))

        return after

    handles.append(embedding(model).register_forward_hook(lambda _, args, out: out.requires_grad_()))
    for module_name, module in model.named_modules():
        if f"{module_name}.weight" in names:
            handles.append(module.register_forward_hook(hook(f"{module_name}.weight")))
    try:
        with frozen(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def owned_weights(model: nn.Module, axes: tuple[Axis, ...]) -> list[str]:
    """Names of the module weights in which a unit of the axes owns rows or columns; lm_head last, tied or not."""
    names = [f"{name}.weight" for name, module in model.named_modules() if hasattr(module, "weight")]
    return [name for name in names if any(units and AXIS_OF_UNITS[units] in axes for units in cut(name).dims)]


def signed_products(
    model: nn.Module, topology: Topology, input_ids: Tensor, axes: tuple[Axis, ...], progress: bool = True
) -> dict[tuple[str, int], Tensor]:
    """Σ w·∂L/∂w over each row and column that a unit owns, L the mean cross-entropy over all windows.

    Returns:
        float64 [rows or columns] by weight name and dimension (0 rows with their biases, 1 columns). Of a tied head
        both uses are summed under the embedding's name.
    """
    products: dict[tuple[str, int], Tensor] = {}

    def add(key: tuple[str, int], values: Tensor) -> None:
        products[key] = products.get(key, 0) + values.double()

    def observe(seen: Seen) -> None:
        dims = cut(seen.name).dims
        gradient = seen.gradient.float()
        along_rows = (gradient * seen.y.float()).sum(0)
        if isinstance(seen.module, nn.Linear):
            if _asked(dims[0], axes):
                add((seen.name, 0), along_rows)
            if _asked(dims[1], axes):
                back = (seen.gradient @ seen.module.weight).float()
                add((seen.name, 1), (seen.x.float() * back).sum(0))
        else:
            # An embedding's column or a norm's weight: its product is seen at the output.
            add((seen.name, len(dims) - 1), along_rows)
        if seen.name == _FINAL_NORM:
            # The head reads the norm's output h: Σ over its column of w·∂L/∂w = Σ_t h·∂L/∂h.
            tied = lm_head(model).weight is embedding(model).weight
            add((_EMBEDDING if tied else _HEAD, 1), along_rows)

    names = set(owned_weights(model, axes)) - {_HEAD}
    with watched(model, names, observe):
        for window in tqdm(_windows(model, input_ids), desc="gradients", disable=not progress):
            hidden = _hidden(model, window)
            loss = cross_entropy(hidden, lm_head(model).weight, next_token_labels(window))
            (loss / len(input_ids)).backward()
    return products


def absolute_products(
    model: nn.Module,
    input_ids: Tensor,
    axes: tuple[Axis, ...],
    objective: Objective,
    layers_at_once: int | None = None,
    progress: bool = True,
) -> dict[tuple[str, int], Tensor]:
    """Σ abs(w·g) over each row and column that a unit owns, g the gradient of the mean objective over all windows.

    Args:
        objective: "loss", the cross-entropy; "logits", the mean over the vocabulary of each token's largest logit in
            the window.
        layers_at_once: layers whose full gradients (fp32) are in memory together; the windows run once for each
            such group. None = all.

    Returns:
        float32 [rows or columns] by parameter name and dimension. A tied head is counted with the embedding.
    """
    layers = len(list(layer_modules(model)))
    step = layers_at_once or layers
    products: dict[tuple[str, int], Tensor] = {}
    for first in range(0, layers, step):
        group = [
            name
            for name in owned_weights(model, axes)
            if (cut(name).layer or 0) in range(first, first + step) and (cut(name).layer is not None or first == 0)
        ]
        gradients = _full_gradients(model, input_ids, set(group), objective, progress)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, gradient in gradients.items():
            product = gradient.mul_(parameters[name].detach().float()).abs_()
            for dim, units in enumerate(cut(name).dims):
                if _asked(units, axes):
                    products[name, dim] = product if product.dim() == 1 else product.sum(1 - dim)
    return products


def pool(topology: Topology, products: dict[tuple[str, int], Tensor], axes: tuple[Axis, ...]) -> Scores:
    """Sum what each unit owns over rows, columns and matrices: float32 per axis in play, shapes of gates."""
    scores: Scores = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES if axis in axes}
    for (name, dim), values in products.items():
        where = cut(name)
        units = where.dims[dim]
        if units is None or AXIS_OF_UNITS[units] not in axes:
            continue
        axis = AXIS_OF_UNITS[units]
        pooled = values.float().cpu().view(topology.width(axis), -1).sum(1)
        if axis == "hidden":
            scores[axis] += pooled
        else:
            assert where.layer is not None
            scores[axis][where.layer] += pooled
    return scores


def _full_gradients(
    model: nn.Module, input_ids: Tensor, names: set[str], objective: Objective, progress: bool
) -> dict[str, Tensor]:
    """∂/∂W of the mean objective: float32 by parameter name, biases of the named weights too."""
    gradients: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        if name in gradients:
            gradients[name] += gradient
        else:
            gradients[name] = gradient.float()

    def observe(seen: Seen) -> None:
        g = seen.gradient.float()
        if isinstance(seen.module, nn.Linear):
            add(seen.name, g.T @ seen.x.float())
            if seen.module.bias is not None:
                add(seen.name.removesuffix("weight") + "bias", g.sum(0))
        elif isinstance(seen.module, nn.Embedding):
            if seen.name not in gradients:
                gradients[seen.name] = torch.zeros_like(seen.module.weight, dtype=torch.float32)
            gradients[seen.name].index_add_(0, seen.x, g)
        else:
            # A norm's output is weight · normed input; where the weight is 0, so is the product asked for.
            add(seen.name, ((g * seen.y.float()).sum(0) / seen.module.weight.detach().float()).nan_to_num_(0, 0, 0))

    head = lm_head(model).weight.detach()
    tied = lm_head(model).weight is embedding(model).weight
    share = 1 / len(input_ids)
    with watched(model, names - {_HEAD}, observe):
        for window in tqdm(_windows(model, input_ids), desc="gradients", disable=not progress):
            hidden = _hidden(model, window)
            with torch.no_grad():
                labels = next_token_labels(window)
                on_hidden, on_head = _objective_gradients(hidden.detach(), head, labels, objective, _HEAD in names)
                if on_head is not None:
                    add(_EMBEDDING if tied else _HEAD, on_head.mul_(share))
            hidden.backward((on_hidden * share).to(hidden.dtype))
    return gradients


def _objective_gradients(
    hidden: Tensor, head: Tensor, labels: Tensor, objective: Objective, want_head: bool, chunk: int = 128
) -> tuple[Tensor, Tensor | None]:
    """Gradients of one window's objective: float32 [tokens, width], and [vocab, width] if wanted."""
    on_head = torch.zeros_like(head, dtype=torch.float32) if want_head else None
    if objective == "logits":
        peak = torch.cat([(hidden @ rows.T).float().argmax(0) for rows in head.split(8192)])
        on_hidden = torch.zeros_like(hidden, dtype=torch.float32).index_add_(0, peak, head.float() / len(head))
        return on_hidden, None if on_head is None else on_head.add_(hidden[peak].float() / len(head))
    counted = (labels >= 0).sum()
    on_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = hidden[start : start + chunk]
        target = labels[start : start + chunk]
        on_logits = (rows @ head.T).float().softmax(-1)
        on_logits.scatter_add_(1, target.clamp_min(0)[:, None], torch.full_like(on_logits[:, :1], -1))
        on_logits *= ((target >= 0) / counted)[:, None]
        on_hidden[start : start + chunk] = on_logits.to(head.dtype) @ head
        if on_head is not None:
            on_head.addmm_(on_logits.T, rows.float())
    return on_hidden, on_head


def _asked(units: Units | None, axes: tuple[Axis, ...]) -> bool:
    return units is not None and AXIS_OF_UNITS[units] in axes


def _windows(model: nn.Module, input_ids: Tensor) -> list[Tensor]:
    """int64 [1, seq_len] each, on the model's device."""
    return list(input_ids.long().to(next(model.parameters()).device).split(1))


def _hidden(model: nn.Module, window: Tensor) -> Tensor:
    """[1, seq_len] to normed hidden states [seq_len, hidden]."""
    return decoder(model)(input_ids=window, use_cache=False).last_hidden_state[0]
