"""Gate training: the budget at every step, resumption bit by bit, the gates' gradients."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import FAMILIES, random_masks, random_update, stairs_table, tiny_model
from tools.try_steps import with_steps
from tvaprune.architecture.attention import use_training_attention
from tvaprune.architecture.parameter_counts import (
    decoder_parameters,
    dense_decoder_parameters,
    dense_unit_costs,
    kept_decoder_parameters,
    sparsity,
)
from tvaprune.architecture.topology import GATED_SITES, Site, Topology
from tvaprune.distributed import ALONE
from tvaprune.gates import budget, insertion, paper
from tvaprune.gates.budget import RunningNorm, Step, cubic_ramp
from tvaprune.gates.closed_form import importance
from tvaprune.gates.curvature import RunningCurvature, gate_curvature
from tvaprune.gates.grasprune import GraspruneGates
from tvaprune.gates.insertion import GatedModel, SquaredGradients, hard_gates
from tvaprune.gates.latency import LatencyGates, _around_zero
from tvaprune.gates.objective import objective
from tvaprune.gates.paper import NoisePool, PaperGates, kl, pool_size
from tvaprune.gates.straight_through import LEARNING_RATE, SLOPE, StraightThroughGates, tangent_to_budget
from tvaprune.gates.training import Learned, learn_gates, new_gates
from tvaprune.losses import DivergedError
from tvaprune.masks.latency_table import AIM
from tvaprune.masks.masks import Masks, log_alpha
from tvaprune.masks.projection import UnreachableSparsityError, keep_above, solve_threshold
from tvaprune.methods import Found, check_request, find_masks, learned_message, masks_metrics, projection_warning
from tvaprune.options.axes import AXES, UNIT_AXES, Axis
from tvaprune.options.baselines import FlapOptions, MagnitudeOptions
from tvaprune.options.gates import (
    GateOptions,
    GraspruneOptions,
    LatencyGoal,
    PaperOptions,
    PerAxis,
    TvaOptions,
)
from tvaprune.options.masks import METHOD_OPTIONS, MaskRequest

WINDOWS = torch.randint(0, 128, (12, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
TVA = TvaOptions(
    steps=30, batch_size=2, ramp=0.6, curvature_windows=4, curvature_tokens=8,
    head_start=PerAxis(hidden=1.0, intermediate=0.0, kv_heads=0.5), mean_lr=0.01,
    clip_ratio=None,
)  # fmt: skip
DETERMINISTIC = replace(TVA, ablation="deterministic")
PAPER = PaperOptions(
    steps=30, batch_size=2, ramp=0.6, init_log_var=-3.0, lr=0.2, lambda_lr=20.0, kl_weight=PerAxis(1e-6, 1e-6, 1e-6),
    slope=1.0,
)  # fmt: skip

GRASPRUNE = GraspruneOptions(mask_steps=15, scale_steps=15, batch_size=2, lr=0.1)
of_every_kind = pytest.mark.parametrize(
    "options", [TVA, DETERMINISTIC, PAPER, GRASPRUNE], ids=["tva", "deterministic", "paper", "grasprune"]
)


def learn(
    options: GateOptions,
    sparsity: float = 0.3,
    family: str = "llama",
    axes: tuple[Axis, ...] = AXES,
    saver: Any = None,
) -> Learned:
    model = tiny_model(family)
    gates = new_gates(Topology.of(model.config), options, sparsity, axes, torch.device("cpu"), seed=0)
    return learn_gates(model, WINDOWS, gates, saver, progress=False)


def open_options(method: str) -> Any:
    """A method's default options, but with no layer protected: the tiny models have three."""
    kind = METHOD_OPTIONS[method]
    protecting = {field.name for field in fields(kind)} & {"protect_first", "protect_last"}
    return kind(**dict.fromkeys(protecting, 0))


def latency_gates(family: str = "llama", ratio: float = 0.7, seed: int = 0) -> tuple[Any, LatencyGates]:
    """A tiny model, and gates for a share of what a made-up table says of its decode."""
    model = tiny_model(family)
    topology = Topology.of(model.config)
    measured, goal = stairs_table(topology, seed), LatencyGoal("decode", ratio)
    return model, LatencyGates(topology, TVA, goal, measured, AXES, torch.device("cpu"), seed=0)


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


@pytest.mark.parametrize("options", [TVA, DETERMINISTIC], ids=["closed form", "straight through"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_at_every_step_and_at_the_end(family: str, options: TvaOptions) -> None:
    topology = Topology.of(tiny_model(family).config)
    learned = learn(options, 0.4, family)
    unit = max(float(cost.max()) for cost in dense_unit_costs(topology).values())
    dearest = (unit + 2 * topology.hidden) / dense_decoder_parameters(topology)  # and its norms
    for row in learned.curve:
        assert row["target"] - 1e-9 <= row["sparsity"] <= row["target"] + dearest
    assert sparsity(topology, learned.masks.widths()) == pytest.approx(0.4, abs=0.002)
    assert sparsity(topology, learned.masks.widths()) >= 0.4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_latency_is_met_at_every_step_and_at_the_end(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gates = latency_gates(family)
    asked, kept, select = [], [], gates.select

    def watched(scheduled: float) -> Any:
        found = select(scheduled)
        asked.append(1 - scheduled)
        kept.append(gates._budget.share(gates._widths))
        return found

    monkeypatch.setattr(gates, "select", watched)
    learned = learn_gates(model, WINDOWS, gates, progress=False)
    assert [1 - row["target"] for row in learned.curve] == asked[:-1]
    assert asked[-1] == pytest.approx(AIM * 0.7)
    for most, predicted in zip(asked, kept, strict=True):
        assert most - 0.1 < predicted <= most + 1e-9  # the dearest step that may not fit is of hidden
    table = stairs_table(gates.topology, 0)
    widths = learned.masks.widths()
    counts = widths["intermediate"].tolist(), widths["kv_heads"].tolist()
    share = table.predict("decode", int(widths["hidden"]), *counts) / table.dense("decode", gates.topology)
    assert share == pytest.approx(kept[-1])
    for axis, score in learned.masks.score.items():
        assert torch.equal(learned.masks.keep[axis], score > 0)
        order = torch.sort(gates.score[axis], descending=True, stable=True).indices
        assert bool((score.gather(-1, order).diff(dim=-1) <= 0).all()), "a vector's order is that of its scores"


def test_without_a_head_start_units_are_worth_their_curvature_to_a_latency() -> None:
    model, topology = tiny_model("llama"), Topology.of(tiny_model("llama").config)
    options, table = replace(TVA, head_start=PerAxis(0.0, 0.0, 0.0)), stairs_table(topology, 0)
    gates = LatencyGates(topology, options, LatencyGoal("decode", 0.7), table, AXES, torch.device("cpu"), seed=0)
    with GatedModel(model, topology).inserted() as gated:
        gates.start(gated, WINDOWS, ALONE, progress=False)
        curvature = gate_curvature(gated, WINDOWS[-4:].long(), 8, seed=0, progress=False)
    for axis, worth in gates._worth().items():
        torch.testing.assert_close(worth, curvature[axis].double(), rtol=1e-3, atol=1e-9)


def test_equal_scores_on_both_sides_of_a_cut_stay_on_their_sides() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 0.0], [2.0, 1.0, 4.0, 3.0], [0.0, -1.0, -2.0, -3.0]])
    keep = torch.tensor([[True, True, False, False], [True, True, True, True], [False, False, False, False]])
    assert torch.equal(_around_zero(score, keep) > 0, keep)


def test_a_killed_run_for_a_latency_ends_bitwise_as_an_undisturbed_one() -> None:
    def learn_for_latency(saver: Any) -> Learned:
        model, gates = latency_gates()
        return learn_gates(model, WINDOWS, gates, saver, progress=False)

    assert_a_killed_run_ends_alike(learn_for_latency)


def assert_a_killed_run_ends_alike(learn: Callable[[Any], Learned]) -> None:
    """`learn` takes a saver, or None."""
    undisturbed, killed = learn(None), Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        learn(killed)
    resumed = learn(killed)
    for axis in AXES:
        assert torch.equal(undisturbed.update.scale[axis], resumed.update.scale[axis])
        assert torch.equal(undisturbed.masks.score[axis], resumed.masks.score[axis])
        assert torch.equal(undisturbed.masks.keep[axis], resumed.masks.keep[axis])
    assert undisturbed.update.channel_scale.keys() == resumed.update.channel_scale.keys()
    for site, mean in undisturbed.update.channel_scale.items():
        assert torch.equal(mean, resumed.update.channel_scale[site])
    assert undisturbed.curve == resumed.curve
    assert undisturbed.seconds_before == 0 < resumed.seconds_before


def test_a_latency_goal_reaches_the_report_and_one_out_of_reach_is_refused_at_once() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    measured = stairs_table(topology, 0)
    request = MaskRequest("tva", TVA, 0.3, latency=LatencyGoal("decode", 0.7))
    found = find_masks(model, WINDOWS, WINDOWS[:2], request, progress=False, table=measured)
    report = masks_metrics(found, model.config, request, measured)
    assert "target_sparsity" not in report
    assert report["target_latency"] == 0.7
    assert report["decode"]["predicted_share"] <= AIM * 0.7 + 1e-9
    assert 0 < report["sparsity_decoder"] < 1
    assert learned_message(report, request).startswith(
        f"predicted {report['decode']['predicted_share']:.3f} of the dense"
    )
    with pytest.raises(ValueError, match=r"learn_masks\.latency\.ratio = 0\.01"):
        latency_gates(ratio=0.01)


@of_every_kind
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(options: GateOptions) -> None:
    assert_a_killed_run_ends_alike(lambda saver: learn(options, saver=saver))


def test_a_killed_run_goes_on_clipping_at_the_norms_before_the_kill() -> None:
    options = replace(TVA, clip_ratio=1.05)  # cuts about every other step
    assert_a_killed_run_ends_alike(lambda saver: learn(options, saver=saver))


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_processes() -> None:
    saver, request = Memory(stop_after=1), MaskRequest("tva", TVA, 0.3)
    with pytest.raises(KeyboardInterrupt):
        find_masks(tiny_model("llama"), WINDOWS, WINDOWS[:2], request, saver, progress=False)
    saved = saver.load()
    assert saved is not None
    saver.save({**saved, "seconds": 1e6})
    found = find_masks(tiny_model("llama"), WINDOWS, WINDOWS[:2], request, saver, progress=False)
    assert 1e6 < found.seconds < 1e6 + 600


@pytest.mark.parametrize("method", ["flap", "magnitude", "osscar"])
def test_means_are_trained_on_a_baselines_masks(method: str) -> None:
    """The masks and matrices stay; the means bring the masked model nearer to the text that they learn."""
    model = tiny_model("llama")
    windows = WINDOWS  # of 24 tokens: no multiple of curvature_tokens, which nothing here needs
    axes: tuple[Axis, ...] = ("intermediate", "kv_heads")
    request = MaskRequest(method, open_options(method), 0.3, axes)
    bare = find_masks(model, windows, windows, request, progress=False)
    trained = find_masks(model, windows, windows, replace(request, means_steps=20), progress=False)
    for axis in AXES:
        assert torch.equal(bare.masks.keep[axis], trained.masks.keep[axis])
        assert torch.equal(bare.masks.score[axis], trained.masks.score[axis])
    assert trained.validation_nll["binary"] == pytest.approx(bare.validation_nll["binary"])
    assert trained.validation_nll["mean"] < min(bare.validation_nll["binary"], bare.validation_nll["mean"])
    for axis, keep in trained.masks.keep.items():
        assert bool((trained.update.scale[axis][~keep] == 1).all()), "what is dropped learns no mean"
    assert not trained.update.mean_input
    assert trained.update.weight.keys() == bare.update.weight.keys()
    assert all(torch.equal(weight, bare.update.weight[name]) for name, weight in trained.update.weight.items())
    assert [row["sparsity"] for row in trained.curve] == pytest.approx([row["target"] for row in trained.curve])


def test_the_papers_form_learns_and_is_projected_onto_the_target() -> None:
    topology = Topology.of(tiny_model("llama").config)
    learned = learn(PAPER)
    assert learned.curve[-1]["sparsity"] > 0.02
    assert sparsity(topology, learned.masks.widths()) == pytest.approx(0.3, abs=0.002)


def report(options: GateOptions) -> dict[str, Any]:
    request = MaskRequest(options.method, options, 0.3)
    model = tiny_model("llama")
    return masks_metrics(find_masks(model, WINDOWS, WINDOWS[:2], request, progress=False), model.config, request)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_the_report_counts_a_tied_matrix_once(family: str) -> None:
    model, request = tiny_model(family), MaskRequest("magnitude", MagnitudeOptions(0, 0), 0.3)
    found = find_masks(model, WINDOWS, WINDOWS[:2], request, progress=False)
    counts = masks_metrics(found, model.config, request)
    assert counts["params_dense"] == sum(parameter.numel() for parameter in model.parameters())
    outside = model.config.vocab_size * (1 if model.config.tie_word_embeddings else 2) + 1  # of a residual dimension
    kept = kept_decoder_parameters(Topology.of(model.config), found.masks.keep)
    assert counts["params_kept"] == kept + counts["hidden_kept"] * outside


@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
@pytest.mark.parametrize("target", [0.4, 0.65])
def test_grasprune_pays_in_the_end_for_the_units_that_every_layer_keeps(family: str, target: float) -> None:
    topology = Topology.of(tiny_model(family).config)
    learned = learn(GRASPRUNE, target, family, UNIT_AXES)
    cost = dense_unit_costs(topology)
    forced = (
        topology.layers
        * float(cost["intermediate"].max() + cost["kv_heads"].max())
        / dense_decoder_parameters(topology)
    )
    dearest = float(cost["kv_heads"].max()) / dense_decoder_parameters(topology)
    for row in learned.curve[: GRASPRUNE.mask_steps]:
        assert target - forced <= row["sparsity"] <= target + dearest
    reached = sparsity(topology, learned.masks.widths())
    assert target <= reached < target + 0.002
    assert {row["sparsity"] for row in learned.curve[GRASPRUNE.mask_steps :]} == {reached}
    for axis in UNIT_AXES:
        assert bool(learned.masks.keep[axis].any(-1).all())
        assert torch.equal(learned.masks.keep[axis], learned.masks.score[axis] > 0)
        kept = learned.update.scale[axis][learned.masks.keep[axis]]
        assert bool(((kept - 1).abs() <= GRASPRUNE.scale_range).all())
        assert torch.equal(learned.update.scale[axis] != 1, learned.masks.keep[axis]), "what is dropped learns no scale"
    keys = learned.update.scale["kv_heads"].repeat_interleave(topology.head_dim, -1)
    assert torch.equal(learned.update.channel_scale["keys"], keys)


def test_grasprune_pays_for_the_parameters_that_no_unit_owns() -> None:
    topology = Topology.of(tiny_model("llama_bias").config)
    gates = GraspruneGates(topology, GRASPRUNE, 0.3, UNIT_AXES, torch.device("cpu"))
    for seed in range(5):
        scores = random_masks(topology, seed).score
        gates.score = {"intermediate": scores["intermediate"], "kv_heads": scores["kv_heads"] + 10}  # heads stay
        keep = Masks.dense(topology).keep | gates.select()
        assert sparsity(topology, Masks(keep, scores).widths()) >= 0.3


def test_the_scales_of_grasprune_lower_the_loss_of_its_masks() -> None:
    request = MaskRequest("grasprune", replace(GRASPRUNE, lr=0.02, scale_steps=30), 0.3, UNIT_AXES)
    nll = find_masks(tiny_model("llama"), WINDOWS, WINDOWS, request, progress=False).validation_nll
    assert nll["mean"] < nll["binary"] - 0.01


def test_the_learned_sparsity_is_told_from_the_projected_one() -> None:
    """At the paper's start the sparsity loss has no gradient: the projection makes what training did not learn."""
    saturated = report(replace(PAPER, steps=4, init_log_var=-9.0, slope=10.0, lr=0.01))
    assert saturated["sparsity_learned"] < 0.01
    assert saturated["sparsity_decoder"] >= 0.3
    assert "training reached a sparsity of 0.00" in (projection_warning(saturated) or "")
    assert projection_warning(report(replace(TVA, steps=8))) is None


@pytest.mark.parametrize("factor", [torch.nan, 1e38])
def test_a_step_that_is_not_finite_stops_and_leaves_the_last_good_state(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = budget.objective, []

    def breaking(*arguments: Any) -> Any:
        calls.append(0)
        loss = plain(*arguments)
        return loss * factor * factor if len(calls) == 15 else loss

    monkeypatch.setattr(budget, "objective", breaking)
    saver = Memory()
    with pytest.raises(DivergedError, match=r"learn_masks: step 15, windows \[4, 5\]: loss (nan|inf)"):
        learn(TVA, saver=saver)
    state = saver.load()
    assert state is not None
    assert len(state["curve"]) == 10
    assert all(score.isfinite().all() for score in state["gates"]["score"].values())


@of_every_kind
def test_axes_out_of_play_stay_whole(options: GateOptions) -> None:
    masks = learn(options, axes=("intermediate",)).masks
    assert masks.keep["hidden"].all()
    assert masks.keep["kv_heads"].all()
    assert sparsity(Topology.of(tiny_model("llama").config), masks.widths()) == pytest.approx(0.3, abs=0.002)


@of_every_kind
def test_the_model_is_left_as_it_was(options: GateOptions) -> None:
    model = tiny_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(WINDOWS.long()).logits
    gates = new_gates(Topology.of(model.config), with_steps(options, 3), 0.3, AXES, torch.device("cpu"), 0)
    learn_gates(model, WINDOWS, gates, progress=False)
    assert torch.equal(model(WINDOWS.long()).logits, logits)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gate_gradients_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the gate written as x · z, differentiated by autograd alone."""
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks, update = random_masks(topology, seed=5), random_update(topology, seed=5)

    def gradients() -> list[torch.Tensor]:
        gates = {axis: value.requires_grad_() for axis, value in hard_gates(masks.keep, update.scale).items()}
        with GatedModel(model, topology).inserted() as gated:
            means = {site: mean.clone().requires_grad_() for site, mean in update.channel_scale.items()}
            gated.set(gates, int(masks.keep["hidden"].sum()), means)
            logits = model(WINDOWS[:2].long()).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, WINDOWS[:2, 1:].long().flatten()).backward()
        return [value.grad for value in (*gates.values(), *means.values())]

    ours = gradients()

    class Plain:
        @staticmethod
        def apply(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x * z

    monkeypatch.setattr(insertion, "_Multiply", Plain)
    for own, plain in zip(ours, gradients(), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_a_sampled_factor_multiplies_in_place_of_the_gate_and_sees_every_site_once() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    seen: list[tuple[Axis, int, Site | None]] = []

    def sample(axis: Axis, layer: int, site: Site | None, gate: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        seen.append((axis, layer, site))
        assert gate.shape == shape[-1:]
        return (2 * gate).expand(shape)

    ones = {axis: torch.ones(topology.gate_shape(axis)) for axis in AXES}
    windows = WINDOWS[:2].long()
    with GatedModel(model, topology).inserted() as gated:
        gated.set(ones, topology.hidden, sample=sample)
        sampled = model(windows).logits
        gated.set({axis: 2 * one for axis, one in ones.items()}, topology.hidden)
        torch.testing.assert_close(sampled, model(windows).logits)
    assert len(seen) == len(set(seen)) == 1 + 4 * topology.layers


def test_noise_is_the_same_on_one_process_and_on_two_and_in_a_repeated_forward() -> None:
    topology = Topology.of(tiny_model("llama").config)
    pool = NoisePool(3, torch.device("cpu"), torch.float32, pool_size(topology, 24))
    pool.start_step(7, range(4))
    whole = pool.draw(torch.Size((4, 24, 96)), site=5)
    assert torch.equal(whole, pool.draw(torch.Size((4, 24, 96)), site=5))
    assert not torch.equal(whole, pool.draw(torch.Size((4, 24, 96)), site=6))
    pool.start_step(7, range(2, 4))
    assert torch.equal(whole[2:], pool.draw(torch.Size((2, 24, 96)), site=5))
    pool.start_step(8, range(4))
    assert not torch.equal(whole, pool.draw(torch.Size((4, 24, 96)), site=5))


def test_tangent_gradient_does_not_move_the_budget() -> None:
    topology = Topology.of(tiny_model("llama").config)
    scores = random_masks(topology, seed=4).score
    threshold = solve_threshold(topology, scores, 0.3)
    keep = keep_above(scores, threshold)
    soft = {axis: torch.sigmoid(4.0 * (scores[axis] - threshold)) for axis in AXES}
    surrogate = {axis: 4.0 * soft[axis] * (1 - soft[axis]) for axis in AXES}
    gradient = {axis: torch.randn(topology.gate_shape(axis)) for axis in AXES}
    across = tangent_to_budget(topology, keep, surrogate, gradient)
    along = {axis: gradient[axis] * surrogate[axis] - across[axis] for axis in AXES}
    inner = sum(float((across[axis] * along[axis]).sum()) for axis in AXES)
    size = sum(float(along[axis].square().sum()) for axis in AXES)
    assert size > 0
    assert abs(inner) < 1e-5 * size
    # What was removed is the budget's own gradient: each unit's parameters through the surrogate, times one number.
    units = along["intermediate"] / surrogate["intermediate"]
    heads = along["kv_heads"] / surrogate["kv_heads"]
    torch.testing.assert_close(units, units.mean().expand_as(units), rtol=1e-2, atol=0)
    per_head = 2 * topology.head_dim * (1 + topology.group_size)
    torch.testing.assert_close(heads.mean() / units.mean(), torch.tensor(per_head / 3.0), rtol=1e-2, atol=0)


def test_a_straight_through_step_lowers_the_scores_of_units_that_raise_the_loss() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    gates = StraightThroughGates(topology, DETERMINISTIC, 0.3, AXES, torch.device("cpu"), seed=0)
    with GatedModel(model, topology).inserted() as gated:
        gates.start(gated, WINDOWS, ALONE, progress=False)
    keep, threshold = gates.select(0.3)
    before = {axis: score.clone() for axis, score in gates.score.items()}
    slope = {axis: torch.sigmoid(SLOPE[1] * (before[axis] - threshold)) for axis in AXES}
    surrogate = {axis: SLOPE[1] * soft * (1 - soft) for axis, soft in slope.items()}
    raises = {axis: torch.randn(topology.gate_shape(axis)) for axis in AXES}
    gates.rescore(Step(keep, threshold, raises, 1.0, 1.0, progress=1.0), None, ALONE)
    for axis, gradient in tangent_to_budget(topology, keep, surrogate, raises).items():
        steep = gradient.abs() > 1e-4
        assert steep.any()
        moved = gates.score[axis] - before[axis]
        torch.testing.assert_close(moved[steep], -LEARNING_RATE * gradient[steep].sign(), rtol=0.05, atol=0)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_step_of_the_paper_follows_the_gradient_of_its_loss(
    clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy, KL and penalty by plain autograd, where every draw of the noise is 1."""
    model = tiny_model("llama")
    topology, windows = Topology.of(model.config), WINDOWS[:2].long()
    options = replace(PAPER, clip=clip, kl_weight=PerAxis(3e-4, 2e-4, 1e-4))
    gates = PaperGates(topology, options, 0.3, AXES, torch.device("cpu"), seed=0)
    gates.multipliers.copy_(torch.tensor([0.5, 0.7]))
    mean = {axis: gates.mean[axis].clone().requires_grad_() for axis in AXES}
    log_var = {axis: gates.log_var[axis].clone().requires_grad_() for axis in AXES}
    steps: list[list[torch.Tensor]] = []
    monkeypatch.setattr(NoisePool, "draw", lambda _, shape, site: torch.ones(shape))
    monkeypatch.setattr(paper, "take_step", lambda _, gradients, lr: steps.append(gradients))
    with GatedModel(model, topology).inserted() as gated:
        row = gates.step(gated, windows, 8, ALONE)
        gated.set({axis: mean[axis] + torch.exp(log_var[axis] / 2) for axis in AXES}, topology.hidden)
        loss = objective(model, windows)
    counts = [torch.sigmoid(options.slope * log_alpha(mean[axis], log_var[axis])).sum(-1) for axis in AXES]
    gap = 1 - decoder_parameters(topology, *counts) / dense_decoder_parameters(topology) - 0.3 * 9 / 18
    bottleneck = [
        weight * 0.5 * torch.log1p(mean[axis] ** 2 / (log_var[axis].exp() + 1e-8)).sum()
        for axis, weight in zip(AXES, (3e-4, 2e-4, 1e-4), strict=True)
    ]
    (loss + sum(bottleneck) + 0.5 * gap + 0.7 * gap**2).backward()
    missing = float(gap.detach())
    expected = [leaf.grad for leaf in (*mean.values(), *log_var.values())]
    norm = float(torch.cat([each.flatten() for each in expected]).norm())
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert norm > 0.01, "nothing was clipped"
    for own, plain in zip(steps[0], expected, strict=True):
        torch.testing.assert_close(own, plain if clip is None else plain * clip / norm, rtol=1e-3, atol=1e-6)
    assert steps[1][0].tolist() == pytest.approx([missing, missing**2], rel=1e-3)


def test_the_multipliers_of_the_paper_climb_while_the_sparsity_is_too_low() -> None:
    model = tiny_model("llama")
    gates = PaperGates(Topology.of(model.config), PAPER, 0.3, AXES, torch.device("cpu"), seed=0)
    with GatedModel(model, gates.topology).inserted() as gated:
        row = gates.step(gated, WINDOWS[:2].long(), 8, ALONE)
    assert row["sparsity"] < row["target"]
    assert gates.multipliers[0] < 0 < gates.multipliers[1]  # of the gap, and of its square


def test_schedule_rises_to_the_target_and_stays() -> None:
    values = [cubic_ramp(step / 100, 0.5, 0.7) for step in range(101)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[70:] == [pytest.approx(0.5)] * 31


def test_means_learn_at_full_rate_up_to_the_end_of_the_ramp_and_then_less_and_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(budget, "take_step", lambda optimizer, gradients, lr: rates.append(lr))
    learn(TVA)
    ramp = round(TVA.ramp * TVA.steps)
    falling = [1 - step / (TVA.steps - ramp) for step in range(1, TVA.steps - ramp)]
    assert [rate / TVA.mean_lr for rate in rates] == pytest.approx([1.0] * ramp + falling + [0.02])


@pytest.mark.parametrize(("given", "rate"), [(None, 0.01 * 0.3), (0.007, 0.007), (0.0, 0.0)])
def test_the_rate_of_the_means_follows_the_target_where_none_is_given(
    given: float | None, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(budget, "take_step", lambda optimizer, gradients, lr: rates.append(lr))
    learn(replace(TVA, mean_lr=given), sparsity=0.3)
    assert rates[0] == pytest.approx(rate)


@pytest.mark.parametrize("options", [TVA, DETERMINISTIC], ids=["closed form", "straight through"])
def test_a_head_start_is_added_to_the_first_scores_of_its_axis(options: TvaOptions) -> None:
    def first_scores(head_start: PerAxis) -> dict[Axis, torch.Tensor]:
        model = tiny_model("llama")
        topology, asked = Topology.of(model.config), replace(options, head_start=head_start)
        gates = new_gates(topology, asked, 0.3, AXES, torch.device("cpu"), seed=0)
        with GatedModel(model, topology).inserted() as gated:
            gates.start(gated, WINDOWS, ALONE, progress=False)
        return gates.score

    none, some = first_scores(PerAxis(0.0, 0.0, 0.0)), first_scores(PerAxis(hidden=3.0, intermediate=0.0, kv_heads=1.0))
    for axis, added in (("hidden", 3.0), ("intermediate", 0.0), ("kv_heads", 1.0)):
        torch.testing.assert_close(some[axis], none[axis] + added, rtol=0, atol=1e-4)


def test_scores_are_log_alpha_where_noise_and_kl_balance() -> None:
    """At sigma² = parameters / H, where ½·H·sigma² and the KL balance, log_alpha is the importance."""
    topology = Topology.of(tiny_model("llama").config)
    curvature = {axis: 1e5 * (1 + torch.rand(topology.gate_shape(axis))) for axis in AXES}
    mean = {axis: torch.full(topology.gate_shape(axis), 1.3) for axis in AXES}
    found = importance(topology, mean, curvature)
    for axis, cost in dense_unit_costs(topology).items():
        log_var = torch.log(cost.float() / curvature[axis]).requires_grad_()
        torch.testing.assert_close(log_alpha(mean[axis], log_var), found[axis])
        cost_of_noise = (0.5 * curvature[axis] * log_var.exp()).sum()
        (by_noise,) = torch.autograd.grad(cost_of_noise, log_var)
        (by_kl,) = torch.autograd.grad(kl(mean[axis], log_var), log_var)
        # KL's own slope is -½·mean² / (mean² + sigma²), which is -½ where noise is small.
        share = mean[axis].square() / (mean[axis].square() + log_var.detach().exp())
        torch.testing.assert_close(by_noise, -cost.float() * by_kl / share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("block_tokens", [1, 6, 12, 24])
def test_squares_are_those_of_a_blocks_own_gates(
    block_tokens: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one backward for each block, with gates that open in that block alone and are 1 elsewhere."""
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    masks, update = random_masks(topology, seed=5), random_update(topology, seed=5)
    kept = int(masks.keep["hidden"].sum())
    windows = WINDOWS[:2].long()
    count = windows.numel() // block_tokens

    def loss() -> torch.Tensor:
        logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())

    def gates() -> dict[Axis, torch.Tensor]:
        return {axis: value.requires_grad_() for axis, value in hard_gates(masks.keep, update.scale).items()}

    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    squares = SquaredGradients(topology, block_tokens, torch.device("cpu"))
    whole = gates()
    with GatedModel(model, topology).inserted() as gated:
        gated.set(whole, kept, channel_means=update.channel_scale, squares=squares)
        loss().backward()

    expected = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES}
    total = {axis: torch.zeros(topology.gate_shape(axis)) for axis in AXES}
    for index in range(count):
        here = (
            torch.zeros(count).index_fill_(0, torch.tensor(index), 1.0).repeat_interleave(block_tokens).view(2, -1, 1)
        )

        class Here:
            @staticmethod
            def apply(x: torch.Tensor, z: torch.Tensor, *_: Any, here: torch.Tensor = here) -> torch.Tensor:
                return x * (z * here + z.detach() * (1 - here))

        own = gates()
        with monkeypatch.context() as patched, GatedModel(model, topology).inserted() as gated:
            patched.setattr(insertion, "_Multiply", Here)
            gated.set(own, kept, channel_means=update.channel_scale)
            loss().backward()
        for axis in AXES:
            expected[axis] += own[axis].grad.square()
            total[axis] += own[axis].grad
    for axis in AXES:
        assert expected[axis].sum() > 0
        torch.testing.assert_close(squares.sums[axis], expected[axis], rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(whole[axis].grad, total[axis], rtol=1e-3, atol=1e-6)


def test_blocks_that_do_not_divide_the_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"curvature_tokens = 7 does not divide windows of 24 tokens"):
        learn(replace(TVA, curvature_tokens=7))


def test_the_curvature_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    topology = Topology.of(model.config)
    with GatedModel(model, topology).inserted() as gated:
        whole = gate_curvature(gated, WINDOWS[:3].long(), 24, seed=1, progress=False)
        logits = model(WINDOWS.long()).logits
    assert torch.equal(logits, tiny_model("llama")(WINDOWS.long()).logits)
    assert all((whole[axis] >= 0).all() and whole[axis].sum() > 0 for axis in AXES)


def test_curvature_is_that_of_the_kl_divergence_from_the_dense_model() -> None:
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
    again = RunningCurvature.from_state(running.state_dict(), torch.device("cpu"))
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


def test_a_step_adds_as_many_draws_to_the_curvature_as_it_has_windows() -> None:
    model = tiny_model("llama")
    options = replace(TVA, steps=3)
    gates = new_gates(Topology.of(model.config), options, 0.3, AXES, torch.device("cpu"), seed=0)
    learn_gates(model, WINDOWS, gates, progress=False)
    draws = gates.state_dict()["curvature"]["draws"]
    assert max(float(draws[axis].max()) for axis in AXES) == 3 * options.batch_size


def test_scores_follow_the_training() -> None:
    first, last = (learn(options).masks for options in (replace(TVA, steps=1, mean_lr=0.0), TVA))
    assert not torch.equal(first.keep["intermediate"], last.keep["intermediate"])


def test_uniform_layers_keep_as_many_units_in_each() -> None:
    apart, alike = (learn(replace(TVA, uniform_layers=each)).masks.keep for each in (False, True))
    for axis in ("intermediate", "kv_heads"):
        widths = alike[axis].sum(-1)
        assert int(widths.max() - widths.min()) <= 1  # the projection fills the budget unit by unit
    assert not torch.equal(apart["intermediate"].sum(-1), alike["intermediate"].sum(-1))


@given(
    norms=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40),
    explosion=st.floats(10, 1e6),
    ratio=st.floats(4.5, 8),
)
def test_usual_gradients_pass_and_an_explosion_is_cut(norms: list[float], explosion: float, ratio: float) -> None:
    running = RunningNorm()
    assert [running.factor(norm**2, ratio) for norm in norms] == [1.0] * len(norms)
    cut = running.factor(explosion**2, ratio) * explosion
    assert cut <= 2.0 * ratio * (1 + 1e-9)
    # What was cut counts as cut: with weight ½ at most, so that another explosion is not usual now.
    again = running.factor(explosion**2, ratio) * explosion
    assert again <= 2.0 * ratio * ((1 + ratio**2) / 2) ** 0.5 * (1 + 1e-9)


def test_one_exploding_window_does_not_decide_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = budget.objective

    def learned(clip_ratio: float | None, times: float) -> tuple[torch.Tensor, list[float]]:
        calls = []

        def exploding(*arguments: Any) -> Any:
            calls.append(0)
            return plain(*arguments) * (times if len(calls) == 15 else 1)

        monkeypatch.setattr(budget, "objective", exploding)
        found = learn(replace(TVA, clip_ratio=clip_ratio), 0.4)
        norms = [row["gradient_norm"] for row in found.curve]
        return torch.cat([found.masks.score[axis].flatten() for axis in AXES]), norms

    usual, norms = learned(4.0, 1)
    assert max(norms[1:]) < 4 * min(norms[1:]), "nothing was cut"
    cut, cut_norms = learned(4.0, 1e4)
    assert cut_norms[14] > 1e3 * norms[14]
    decided, _ = learned(None, 1e4)
    assert (cut - usual).abs().mean() < 0.3 * (decided - usual).abs().mean()


def test_kept_parameters_never_exceed_the_budget() -> None:
    topology = Topology.of(tiny_model("llama").config)
    for seed in range(20):
        scores = random_masks(topology, seed).score
        target = 0.05 + 0.04 * seed
        keep = keep_above(scores, solve_threshold(topology, scores, target))
        assert kept_decoder_parameters(topology, keep) <= (1 - target) * dense_decoder_parameters(topology)


@pytest.mark.parametrize("family", ["llama", "llama_mqa", "qwen3"])
def test_training_attention_is_the_stock_one(family: str) -> None:
    stock, ours = tiny_model(family), tiny_model(family)
    use_training_attention(ours, torch.device("cpu"))
    assert ours.config._attn_implementation == "tvaprune_grouped"
    torch.testing.assert_close(ours(WINDOWS.long()).logits, stock(WINDOWS.long()).logits, rtol=1e-4, atol=1e-4)


# Bonsai measures hundreds of sub-models; its scores have faster tests.
SLOWEST = {"bonsai": pytest.mark.nightly}


@pytest.mark.parametrize(
    ("method", "ablation"),
    [
        *(pytest.param(method, None, marks=SLOWEST.get(method, ())) for method in METHOD_OPTIONS),
        ("tva", "deterministic"),
        ("tva", "vtrans"),
    ],
)
def test_every_method_meets_the_same_budget(method: str, ablation: Any) -> None:
    trained = {"tva": replace(TVA, ablation=ablation), "paper": PAPER, "grasprune": GRASPRUNE}
    options = with_steps(trained[method], 8) if method in trained else open_options(method)
    model = tiny_model("llama")
    found = find_masks(model, WINDOWS, WINDOWS[:2], MaskRequest(method, options, 0.3, UNIT_AXES), progress=False)
    assert sparsity(Topology.of(model.config), found.masks.widths()) == pytest.approx(0.3, abs=0.005)
    assert found.validation_nll["binary"] != found.validation_nll["dense"]
    learned_means = not all(torch.equal(mean, torch.ones_like(mean)) for mean in found.update.scale.values())
    assert learned_means == (method in trained and ablation != "vtrans")
    sites = {("tva", None): set(GATED_SITES), ("tva", "deterministic"): set(GATED_SITES), ("grasprune", None): {"keys"}}
    assert set(found.update.channel_scale) == sites.get((method, ablation), set())
    assert len(found.curve) == (8 if method in trained else 0)


@pytest.mark.parametrize(
    "request_",
    [
        MaskRequest("tva", with_steps(TVA, 8), 0.3, AXES),
        MaskRequest("paper", with_steps(PAPER, 8), 0.3, AXES),
        MaskRequest("grasprune", with_steps(GRASPRUNE, 8), 0.3, UNIT_AXES),
        MaskRequest("magnitude", MagnitudeOptions(0, 0), 0.3, UNIT_AXES, means_steps=8),
    ],
    ids=lambda request: request.method,
)
def test_gradient_checkpointing_computes_layers_again_and_learns_the_same(request_: MaskRequest) -> None:
    def run(checkpointing: bool) -> tuple[int, Found]:
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        model = tiny_model("llama")
        model.model.layers[0].mlp.register_forward_pre_hook(count)
        request = replace(request_, gradient_checkpointing=checkpointing)
        found = find_masks(model, WINDOWS, WINDOWS[:2], request, progress=False)
        return passes, found

    (again, recomputed), (once, plain) = run(True), run(False)
    assert again >= once + 8
    for axis in UNIT_AXES:
        torch.testing.assert_close(recomputed.masks.score[axis], plain.masks.score[axis], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(recomputed.update.scale[axis], plain.update.scale[axis], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "axes"), [("flap", AXES), ("nothing", AXES), ("depth", ("intermediate",)), ("grasprune", AXES)]
)
def test_a_method_is_refused_axes_it_cannot_prune(method: str, axes: tuple) -> None:
    request = MaskRequest(method, METHOD_OPTIONS.get(method, TvaOptions)(), 0.2, axes)
    with pytest.raises(ValueError, match=r"learn_masks\.(axes|method)"):
        check_request(request, Topology.of(tiny_model("llama").config))


@pytest.mark.parametrize("family", ["llama", "llama_mqa"])
@pytest.mark.parametrize(
    "method", [method for method in METHOD_OPTIONS if method not in ("tva", "paper", "bonsai", "depth")]
)
def test_a_sparsity_that_passes_the_check_is_one_that_the_method_reaches(method: str, family: str) -> None:
    """Near the limit of each: where a unit is to stay in every layer, less can be removed."""
    topology = Topology.of(tiny_model(family).config)
    requests = [MaskRequest(method, open_options(method), share / 100, UNIT_AXES) for share in range(50, 100, 2)]
    if method == "flap":
        requests = [replace(each, options=FlapOptions(allocation="uniform")) for each in requests]

    def passes(request: MaskRequest) -> bool:
        try:
            check_request(request, topology)
        except UnreachableSparsityError:
            return False
        return True

    reachable = [request for request in requests if passes(request)]
    assert 0 < len(reachable) < len(requests)
    if method not in ("loraprune", "grasprune"):  # of many steps
        found = find_masks(tiny_model(family), WINDOWS, WINDOWS[:2], reachable[-1], progress=False)
        assert sparsity(topology, found.masks.widths()) >= reachable[-1].sparsity - 1e-9


def test_what_a_method_cannot_do_is_refused() -> None:
    goal = LatencyGoal("decode", 0.7)
    for method, options, changed in (
        ("tva", TVA, {"means_steps": 5}),
        ("magnitude", MagnitudeOptions(0, 0), {"latency": goal}),
        ("tva", DETERMINISTIC, {"latency": goal}),
        ("tva", replace(TVA, uniform_layers=True), {"latency": goal}),
    ):
        with pytest.raises(ValueError, match=r"means_steps = 5|budget = latency"):
            MaskRequest(method, options, 0.3, AXES, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity = {sparsity}: must be at least 0 and below 1"):
        check_request(MaskRequest("tva", TVA, sparsity), Topology.of(tiny_model("llama").config))


def test_an_unreachable_sparsity_is_refused_before_any_work() -> None:
    with pytest.raises(UnreachableSparsityError, match=r"sparsity = 0\.9"):
        check_request(MaskRequest("tva", TVA, 0.9, ("kv_heads",)), Topology.of(tiny_model("llama").config))
    with pytest.raises(UnreachableSparsityError, match=r"reach 0\.000 at most"):  # it keeps a head in every layer
        check_request(
            MaskRequest("grasprune", GRASPRUNE, 0.1, ("kv_heads",)), Topology.of(tiny_model("llama_mqa").config)
        )
