"""Gate training: the budget at every step, resumption bit by bit, the gates' gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import FAMILIES, random_masks, tiny_model
from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.parameter_counts import (
    dense_decoder_parameters,
    kept_decoder_parameters,
    sparsity,
    unit_costs,
)
from tvaprune.architecture.topology import AXES, Axis, Topology
from tvaprune.gates import insertion, steps, vib
from tvaprune.gates.constraint import cubic_ramp, hard_gates_under_budget, tangent_to_budget
from tvaprune.gates.curvature import RunningCurvature, gate_curvature
from tvaprune.gates.insertion import GatedModel, GradientDraws, NoisePool, hard_gates
from tvaprune.gates.state import GateTraining, UsualNorm
from tvaprune.gates.training import learn_gates
from tvaprune.masks.projection import UnreachableSparsityError
from tvaprune.methods import check_method, find_masks

WINDOWS = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
SETTINGS = GateTraining(
    steps=30, batch_size=2, constraint="budget", ramp=0.6, init="curvature", init_log_var=0.0, curvature_windows=4,
    curvature_tokens=8,
    log_var="trained", head_start={"hidden": 1.0, "intermediate": 0.0, "kv_heads": 0.5}, log_var_lr=0.05, mu_lr=0.01,
    lambda_lr=0.1, noise=0.0, channel_means=True, kl_weight=dict.fromkeys(AXES, 0.0), ce_weight=1.0,
    distillation_weight=1.0, slope=(2.0, 8.0), clip=None, clip_ratio=None,
)  # fmt: skip
PAPER = replace(
    SETTINGS, constraint="lagrangian", init="constant", init_log_var=-3.0, noise=1.0, slope=(1.0, 1.0),
    channel_means=False, log_var_lr=0.2, kl_weight=dict.fromkeys(AXES, 1e-6), distillation_weight=0.0,
    lambda_lr=20.0, clip=1.0,
)  # fmt: skip

TRACKED = replace(SETTINGS, log_var="tracked")


class Memory:
    """Keeps the state as a file would; `stop_after` saves it raises, as a kill would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.state: bytes | None = None
        self.left = stop_after

    def load(self) -> dict[str, Any] | None:
        import io

        return None if self.state is None else torch.load(io.BytesIO(self.state), weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        import io

        stream = io.BytesIO()
        torch.save(state, stream)
        self.state = stream.getvalue()
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [SETTINGS, TRACKED], ids=["trained", "tracked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_at_every_step_and_at_the_end(family: str, settings: GateTraining) -> None:
    model = tiny_model(family)
    topology = Topology.of(model.config)
    learned = learn_gates(model, topology, WINDOWS, 0.4, settings, progress=False)
    full = [torch.tensor(64), torch.full((3,), 96), torch.full((3,), topology.kv_heads)]
    dearest = max(float(cost.max()) for cost in unit_costs(topology, *full)) + 2 * topology.hidden  # and its norms
    dearest /= dense_decoder_parameters(topology)
    for row in learned.curve:
        assert row["target"] - 1e-9 <= row["sparsity"] <= row["target"] + dearest
    assert sparsity(topology, learned.masks.widths()) == pytest.approx(0.4, abs=0.002)
    assert sparsity(topology, learned.masks.widths()) >= 0.4


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, noise=0.5), TRACKED, PAPER])
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(settings: GateTraining) -> None:
    topology = Topology.of(tiny_model("llama").config)
    undisturbed = learn_gates(tiny_model("llama"), topology, WINDOWS, 0.3, settings, progress=False)
    killed = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        learn_gates(tiny_model("llama"), topology, WINDOWS, 0.3, settings, saver=killed, progress=False)
    resumed = learn_gates(tiny_model("llama"), topology, WINDOWS, 0.3, settings, saver=killed, progress=False)
    for axis in AXES:
        assert torch.equal(undisturbed.masks.mu[axis], resumed.masks.mu[axis])
        assert torch.equal(undisturbed.masks.log_alpha[axis], resumed.masks.log_alpha[axis])
        assert torch.equal(undisturbed.masks.keep[axis], resumed.masks.keep[axis])
    for site, mean in undisturbed.masks.channel_mu.items():
        assert torch.equal(mean, resumed.masks.channel_mu[site])
    assert undisturbed.curve == resumed.curve


def test_the_papers_form_learns_and_is_projected_onto_the_target() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    learned = learn_gates(model, topology, WINDOWS, 0.3, PAPER, progress=False)
    assert learned.curve[-1]["sparsity"] > 0.02
    assert sparsity(topology, learned.masks.widths()) == pytest.approx(0.3, abs=0.002)


def test_axes_out_of_play_stay_whole() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks = learn_gates(model, topology, WINDOWS, 0.3, SETTINGS, axes=("intermediate",), progress=False).masks
    assert masks.keep["hidden"].all()
    assert masks.keep["kv_heads"].all()
    assert sparsity(topology, masks.widths()) == pytest.approx(0.3, abs=0.002)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(WINDOWS.long()).logits
    learn_gates(model, Topology.of(model.config), WINDOWS, 0.3, replace(SETTINGS, steps=3), progress=False)
    assert torch.equal(model(WINDOWS.long()).logits, logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("noisy", [False, True])
def test_gate_gradients_are_those_of_plain_autograd(noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the gate written as x · (z + sigma · eps), differentiated by autograd alone."""
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks = random_masks(topology, seed=5)
    noise = NoisePool(0, torch.device("cpu"), torch.float32, size=1 << 15) if noisy else None

    def gradients() -> list[torch.Tensor]:
        gates = {axis: value.requires_grad_() for axis, value in hard_gates(masks.keep, masks.mu).items()}
        sigma = {axis: (0.1 * masks.keep[axis]).requires_grad_() for axis in AXES} if noisy else None
        with GatedModel(model, topology).inserted() as gated:
            if noise is not None:
                noise.start_step(5, range(2))
            means = {site: mean.clone().requires_grad_() for site, mean in masks.channel_mu.items()}
            gated.set(gates, int(masks.keep["hidden"].sum()), sigma, noise, means)
            logits = model(WINDOWS[:2].long()).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, WINDOWS[:2, 1:].long().flatten()).backward()
        return [value.grad for value in (*gates.values(), *means.values(), *(sigma.values() if sigma else ()))]

    ours = gradients()

    class Plain:
        @staticmethod
        def apply(x: torch.Tensor, z: torch.Tensor, sigma: Any, eps: Any) -> torch.Tensor:
            return x * z if sigma is None else x * (z + sigma * eps)

    monkeypatch.setattr(insertion, "_Multiply", Plain)
    for own, plain in zip(ours, gradients(), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_tangent_gradient_does_not_move_the_budget() -> None:
    topology = Topology.of(tiny_model("llama").config)
    scores = random_masks(topology, seed=4).log_alpha
    hard = hard_gates_under_budget(topology, scores, 0.3, slope=4.0, minimum_hidden=1)
    gradient = {axis: torch.randn(topology.gate_shape(axis)) for axis in AXES}
    across, price = tangent_to_budget(topology, hard, gradient)
    along = {axis: (gradient[axis] * hard.surrogate[axis] - across[axis]) / price for axis in AXES}
    inner = sum(float((across[axis] * along[axis]).sum()) for axis in AXES)
    size = sum(float(along[axis].square().sum()) for axis in AXES)
    assert price != 0
    assert abs(inner) < 1e-5 * size
    # What was removed is the budget's own gradient: each unit's parameters through the surrogate.
    parameters = along["intermediate"] / hard.surrogate["intermediate"]
    torch.testing.assert_close(
        parameters, torch.full_like(parameters, 3.0 * int(hard.keep["hidden"].sum())), rtol=1e-2, atol=1
    )


def test_schedule_rises_to_the_target_and_stays() -> None:
    values = [cubic_ramp(step / 100, 0.5, 0.7) for step in range(101)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[70:] == [pytest.approx(0.5)] * 31


def test_kl_gradient_is_autograds() -> None:
    mu, log_var = torch.randn(50, requires_grad=True), torch.randn(50, requires_grad=True)
    vib.kl(mu, log_var).backward()
    by_mu, by_log_var = vib.kl_gradient(mu.detach(), log_var.detach())
    torch.testing.assert_close(mu.grad, by_mu)
    torch.testing.assert_close(log_var.grad, by_log_var)


def test_stationary_point_balances_curvature_and_kl() -> None:
    mu, curvature, price = torch.full((20,), 1.3), torch.rand(20) + 50, 0.01
    log_var = vib.stationary_log_var(mu, curvature, price).requires_grad_()
    cost = (0.5 * curvature * log_var.exp()).sum() + price * vib.kl(mu, log_var)
    (gradient,) = torch.autograd.grad(cost, log_var)
    assert float(gradient.abs().max()) < 1e-2 * price


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stretch", [1, 6, 12, 24])
def test_draws_are_the_squared_gradients_of_a_stretchs_own_gates(
    stretch: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one backward for each stretch, with gates that open in that stretch alone and are 1 elsewhere."""
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks = random_masks(topology, seed=5)
    kept = int(masks.keep["hidden"].sum())
    windows = WINDOWS[:2].long()
    count = windows.numel() // stretch

    def loss() -> torch.Tensor:
        logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())

    def gates() -> dict[Axis, torch.Tensor]:
        return {axis: value.requires_grad_() for axis, value in hard_gates(masks.keep, masks.mu).items()}

    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    draws = GradientDraws(topology, stretch, torch.device("cpu"))
    whole = gates()
    with GatedModel(model, topology).inserted() as gated:
        gated.set(whole, kept, channel_mu=masks.channel_mu, draws=draws)
        loss().backward()

    expected = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES}
    total = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES}
    for index in range(count):
        here = torch.zeros(count).index_fill_(0, torch.tensor(index), 1.0).repeat_interleave(stretch).view(2, -1, 1)

        class Here:
            @staticmethod
            def apply(x: torch.Tensor, z: torch.Tensor, *_: Any, here: torch.Tensor = here) -> torch.Tensor:
                return x * (z * here + z.detach() * (1 - here))

        own = gates()
        with monkeypatch.context() as patched, GatedModel(model, topology).inserted() as gated:
            patched.setattr(insertion, "_Multiply", Here)
            gated.set(own, kept, channel_mu=masks.channel_mu)
            loss().backward()
        for axis in AXES:
            expected[axis] += own[axis].grad.square()
            total[axis] += own[axis].grad
    for axis in AXES:
        assert expected[axis].sum() > 0
        torch.testing.assert_close(draws.squares[axis], expected[axis], rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(whole[axis].grad, total[axis], rtol=1e-3, atol=1e-6)


def test_stretches_that_do_not_divide_the_windows_are_refused() -> None:
    model = tiny_model("llama")
    settings = replace(TRACKED, curvature_tokens=7)
    with pytest.raises(ValueError, match=r"curvature_tokens = 7 does not divide windows of 24 tokens"):
        learn_gates(model, Topology.of(model.config), WINDOWS, 0.3, settings, progress=False)


def test_the_curvature_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    with GatedModel(model, topology).inserted() as gated:
        whole = gate_curvature(gated, WINDOWS[:3].long(), 24, seed=1, progress=False)
        logits = model(WINDOWS.long()).logits
    assert torch.equal(logits, tiny_model("llama")(WINDOWS.long()).logits)
    assert all((whole[axis] >= 0).all() and whole[axis].sum() > 0 for axis in AXES)


def test_curvature_is_that_of_the_distillation_loss() -> None:
    """On many windows it approaches the diagonal of the Hessian of KL(dense || gated), here by finite differences."""
    model = tiny_model("llama", layers=1)
    topology = Topology.of(model.config)
    windows = WINDOWS[:1].long()
    with GatedModel(model, topology).inserted() as gated:
        draws = [gate_curvature(gated, windows, 24, seed=seed, progress=False)["intermediate"] for seed in range(300)]
        dense = model(windows).logits.log_softmax(-1)

        def divergence(unit: int, step: float) -> float:
            gate = {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}
            gate["intermediate"][0, unit] += step
            gated.set(gate, topology.hidden)
            return float((dense.exp() * (dense - model(windows).logits.log_softmax(-1))).sum())

        estimate = torch.stack(draws).mean(0)[0]
        units = estimate.topk(8).indices.tolist()
        exact = [(divergence(unit, 0.05) + divergence(unit, -0.05)) / 0.05**2 for unit in units]
    for unit, curvature in zip(units, exact, strict=True):
        assert float(estimate[unit]) == pytest.approx(curvature, rel=0.35)


def test_running_curvature_averages_draws_over_kept_units_on_the_starts_scale() -> None:
    start = {axis: torch.tensor([1.0, 2.0, 3.0]) for axis in AXES}
    keep = {axis: torch.tensor([True, True, False]) for axis in AXES}
    running = RunningCurvature(start, windows=2)
    assert all(torch.equal(running.mean()[axis], start[axis]) for axis in AXES)
    # Squares 8 and 4 on the kept units are 2 and 1 on the start's scale, whose total over them is 3.
    running.add({axis: torch.tensor([8.0, 4.0, 99.0]) for axis in AXES}, keep, windows=1)
    for axis in AXES:
        assert running.mean()[axis].tolist() == pytest.approx([(2 + 2) / 3, (4 + 1) / 3, 3.0])
    again = RunningCurvature.from_state(running.state_dict())
    assert all(torch.equal(again.mean()[axis], running.mean()[axis]) for axis in AXES)


def test_running_curvature_does_not_depend_on_the_objectives_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {axis: torch.rand(6, generator=generator) for axis in AXES}
    one, other = RunningCurvature(start, 4), RunningCurvature(start, 4)
    for _ in range(3):
        squares = {axis: torch.rand(6, generator=generator) for axis in AXES}
        keep = {axis: torch.rand(6, generator=generator) > 0.3 for axis in AXES}
        one.add(squares, keep, 2)
        other.add({axis: 1e-4 * value for axis, value in squares.items()}, keep, 2)
    assert all(torch.allclose(one.mean()[axis], other.mean()[axis], rtol=1e-4) for axis in AXES)


def test_tracked_gates_move_with_the_training_and_have_no_rate_or_slope() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    start = replace(TRACKED, steps=1, mu_lr=0.0)
    first, last = (learn_gates(model, topology, WINDOWS, 0.3, one, progress=False).masks for one in (start, TRACKED))
    assert not torch.equal(first.keep["intermediate"], last.keep["intermediate"])
    trained_rate = replace(TRACKED, log_var_lr=5.0, slope=(1.0, 1.0))
    other = learn_gates(model, topology, WINDOWS, 0.3, trained_rate, progress=False).masks
    assert all(torch.equal(last.log_alpha[axis], other.log_alpha[axis]) for axis in AXES)


@given(
    norms=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40),
    explosion=st.floats(10, 1e6),
    ratio=st.floats(4.5, 8),
)
def test_usual_gradients_pass_and_an_explosion_is_cut(norms: list[float], explosion: float, ratio: float) -> None:
    usual = UsualNorm()
    assert [usual.factor(norm**2, ratio) for norm in norms] == [1.0] * len(norms)
    cut = usual.factor(explosion**2, ratio) * explosion
    assert cut <= 2.0 * ratio * (1 + 1e-9)
    assert usual.factor(1.0, ratio) == 1.0, "what was cut counts as cut"


def test_one_exploding_window_does_not_decide_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = steps.objective
    topology = Topology.of(tiny_model("llama").config)

    def learned(clip_ratio: float | None, times: float) -> tuple[torch.Tensor, list[float]]:
        calls = []

        def exploding(gated: GatedModel, *arguments: Any, **inputs: Any) -> Any:
            calls.append(0)
            parts = plain(gated, *arguments, **inputs)
            return parts._replace(loss=parts.loss * (times if len(calls) == 15 else 1))

        monkeypatch.setattr(steps, "objective", exploding)
        found = learn_gates(
            tiny_model("llama"), topology, WINDOWS, 0.4, replace(TRACKED, clip_ratio=clip_ratio), progress=False
        )
        norms = [row["gradient_norm"] for row in found.curve]
        return torch.cat([found.masks.log_alpha[axis].flatten() for axis in AXES]), norms

    usual, norms = learned(4.0, 1)
    assert max(norms[1:]) < 4 * min(norms[1:]), "nothing was cut"
    cut, cut_norms = learned(4.0, 1e4)
    assert cut_norms[14] > 1e3 * norms[14]
    decided, _ = learned(None, 1e4)
    assert (cut - usual).abs().mean() < 0.3 * (decided - usual).abs().mean()


def test_kept_parameters_under_hard_gates_never_exceed_the_budget() -> None:
    topology = Topology.of(tiny_model("llama").config)
    for seed in range(20):
        scores = random_masks(topology, seed).log_alpha
        target = 0.05 + 0.04 * seed
        hard = hard_gates_under_budget(topology, scores, target, 4.0, minimum_hidden=1)
        assert kept_decoder_parameters(topology, hard.keep) <= (1 - target) * dense_decoder_parameters(topology)


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "qwen3"])
def test_training_attention_is_the_stock_one(family: str) -> None:
    stock, ours = tiny_model(family), tiny_model(family)
    use_training_attention(ours, torch.device("cpu"))
    assert ours.config._attn_implementation == "tvaprune_grouped"
    torch.testing.assert_close(ours(WINDOWS.long()).logits, stock(WINDOWS.long()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tva", "deterministic", "vtrans", "random", "flap", "depth"])
def test_every_method_meets_the_same_budget(method: str) -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    axes = ("intermediate", "kv_heads")
    settings = replace(SETTINGS, steps=8, noise=0.3)
    found = find_masks(
        model, WINDOWS, WINDOWS[:2], 0.3, settings, None, method=method, axes=axes, seed=0, progress=False
    )
    assert sparsity(topology, found.masks.widths()) == pytest.approx(0.3, abs=0.005)
    assert found.validation_nll["binary"] != found.validation_nll["dense"]
    learned_means = not all(torch.equal(mu, torch.ones_like(mu)) for mu in found.masks.mu.values())
    assert learned_means == (method in {"tva", "deterministic"})
    assert len(found.curve) == (8 if method in {"tva", "deterministic", "vtrans"} else 0)


def test_gradient_checkpointing_learns_the_same_masks() -> None:
    settings = replace(SETTINGS, steps=8)

    def run(checkpointing: bool) -> torch.Tensor:
        found = find_masks(
            tiny_model("llama"), WINDOWS, WINDOWS[:2], 0.3, settings, None,
            method="tva", axes=AXES, seed=0, gradient_checkpointing=checkpointing, progress=False,
        )  # fmt: skip
        return found.masks.log_alpha["intermediate"]

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "axes"), [("flap", AXES), ("nothing", AXES), ("depth", ("intermediate",))])
def test_a_method_is_refused_axes_it_cannot_prune(method: str, axes: tuple) -> None:
    with pytest.raises(ValueError, match=r"learn_masks\.(axes|method)"):
        check_method(method, axes, 0.2, Topology.of(tiny_model("llama").config))


def test_an_unreachable_sparsity_is_refused_before_any_work() -> None:
    with pytest.raises(UnreachableSparsityError, match=r"sparsity = 0\.9"):
        check_method("tva", ("kv_heads",), 0.9, Topology.of(tiny_model("llama").config))
