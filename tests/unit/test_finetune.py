"""Recovery: the adapter learns, resumes bit by bit, and merges into a directory like the compact one."""

import copy
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from stages.finetune_lora import main
from tests.tiny_models import random_masks, random_update, tiny_model
from tvaprune.architecture.topology import Topology, hidden_states
from tvaprune.artifacts import write_artifact
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.loading import load
from tvaprune.distributed import Process, World
from tvaprune.export.card import Base, Provenance
from tvaprune.export.seal import certify
from tvaprune.options.recovery import RecoveryOptions
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.loading import ParameterError
from tvaprune.proof.certificate import Reference
from tvaprune.proof.parity import compact_logits
from tvaprune.recovery import training
from tvaprune.recovery.lora import (
    CheckpointMismatchError,
    add_lora,
    merge_adapter,
    save_adapter,
    save_like,
    target_names,
)
from tvaprune.recovery.objective import mean_nll
from tvaprune.recovery.report import CurveRow, quality_metrics, write_curve
from tvaprune.recovery.schedule import learning_rate_at, step_windows, total_steps
from tvaprune.recovery.teacher import CachedTeacher, Teacher
from tvaprune.recovery.training import DivergedError, Finetuned, finetune
from tvaprune.resume import NoState, ResumableRun
from tvaprune.verify import verify

VOCAB, SEQ = 128, 16
CPU = torch.device("cpu")
OPTIONS = RecoveryOptions(
    seed=7, rank=4, alpha=8, dropout=0.2, targets="all-linear", use_dora=False, use_rslora=False,
    teacher="online", distillation="kl", distillation_weight=1.0, ce_weight=0.0, temperature=1.0, top_k=None,
    learning_rate=5e-3, weight_decay=0.0, warmup=0.25, decay="cosine", gradient_clip=1.0, batch_size=2, accumulation=2,
    steps=8, epochs=None, gradient_checkpointing=False, validate_every=3, save_every=3,
)  # fmt: skip


def tiny(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, seed=2, layers=2)


def pruned(dense: PreTrainedModel) -> PreTrainedModel:
    """The dense model with layers of uneven widths: half an MLP in layer 0, one kv group in layer 1."""
    student = copy.deepcopy(dense)

    def keep(linear: nn.Linear, rows: int, columns: int) -> nn.Linear:
        smaller = nn.Linear(columns, rows, bias=False)
        smaller.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
        return smaller

    mlp, attention = student.model.layers[0].mlp, student.model.layers[1].self_attn
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        keep(mlp.gate_proj, 48, 64),
        keep(mlp.up_proj, 48, 64),
        keep(mlp.down_proj, 64, 48),
    )
    attention.q_proj, attention.k_proj = keep(attention.q_proj, 32, 64), keep(attention.k_proj, 16, 64)
    attention.v_proj, attention.o_proj = keep(attention.v_proj, 16, 64), keep(attention.o_proj, 64, 32)
    return student


def windows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (count, SEQ), generator=generator, dtype=torch.int32)


def run_finetune(
    state: object,
    options: RecoveryOptions = OPTIONS,
    student: PreTrainedModel | None = None,
    device: torch.device = CPU,
) -> Finetuned:
    dense = tiny()
    student = pruned(dense) if student is None else student
    return finetune(student, dense, windows(5, seed=1), windows(3, seed=2), options, Process(device), state)


def adapter(result: Finetuned) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters() if p.requires_grad}


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_learning_rate_rises_to_the_peak_and_falls_to_almost_nothing(decay):
    options = replace(OPTIONS, warmup=0.1, decay=decay)
    rates = [learning_rate_at(step, 100, options) for step in range(1, 101)]
    assert rates[0] == pytest.approx(options.learning_rate / 10)
    assert rates[9] == rates[10] == options.learning_rate == max(rates)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02 * options.learning_rate


def test_every_epoch_shows_every_window_once_in_another_order():
    order = [window for step in range(5) for window in step_windows(step, 10, OPTIONS)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    other = replace(OPTIONS, seed=8)
    assert order != [window for step in range(5) for window in step_windows(step, 10, other)]


def test_steps_come_from_epochs_or_are_given():
    assert total_steps(replace(OPTIONS, steps=None, epochs=2.0), windows=9) == 5  # 18 windows, 4 a step
    assert total_steps(OPTIONS, windows=9) == 8
    with pytest.raises(ValueError, match="exactly one"):
        replace(OPTIONS, epochs=1.0)


# --- training -------------------------------------------------------------------------------------------------------


def test_recovery_recovers_and_leaves_the_base_alone(tmp_path):
    dense = tiny()
    student = pruned(dense)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    text = dense.generate(torch.arange(1, 121).repeat(5)[:, None], max_length=SEQ, do_sample=True, pad_token_id=0)
    options = replace(
        OPTIONS, rank=16, alpha=32, dropout=0.0, ce_weight=0.1, batch_size=8, steps=60, learning_rate=2e-2, seed=0
    )
    result = finetune(student, dense, text[:-20], text[-20:], options, Process(CPU), NoState(tmp_path))
    validation = result.metrics["validation"]
    assert validation["nll_teacher"] < validation["nll_best"] < validation["nll_start"]
    assert result.metrics["recovered"]["share"] > 0.3
    assert result.metrics["tokens"] == 60 * 8 * 2 * SEQ
    assert mean_nll(student, text[-20:], 8, Process(CPU)) == validation["nll_best"]
    assert validation["nll_best"] == min(row.validation_ce for row in result.curve if row.validation_ce is not None)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in student.state_dict().items()}
    assert_identical(before, {name: after[name] for name in before})


def test_what_comes_back_is_the_best_adapter_and_not_the_last(tmp_path):
    dense = tiny()
    student = pruned(dense)
    own = student.generate(torch.arange(1, 9)[:, None], max_length=SEQ, do_sample=True, pad_token_id=0)
    options = replace(OPTIONS, learning_rate=5e-2)
    result = finetune(student, dense, windows(5, seed=1), own, options, Process(CPU), NoState(tmp_path))
    validation = result.metrics["validation"]
    assert validation["nll_best"] < validation["nll_end"], "other text leads away from its own"
    assert mean_nll(student, own, OPTIONS.batch_size, Process(CPU)) == validation["nll_best"]


def test_the_mean_loss_is_over_windows_whatever_the_batches():
    model, ids = tiny(), windows(3, seed=2)
    logits = model(ids.long()).logits[:, :-1].flatten(0, 1)
    expected = float(nn.functional.cross_entropy(logits, ids[:, 1:].long().flatten()))
    assert [mean_nll(model, ids, size, Process(CPU)) for size in (1, 2, 3)] == pytest.approx([expected] * 3)


def test_what_came_back_is_a_share_of_what_was_lost_by_tokens_and_by_time():
    curve = [CurveRow(step, 500_000 * step, *[None] * 4, validation_ce=nll) for step, nll in enumerate((5.0, 4.0, 4.5))]
    report = quality_metrics(curve, nll_best=4.0, nll_teacher=3.0, seconds=30.0)
    assert report["validation"] == {"nll_start": 5.0, "nll_end": 4.5, "nll_best": 4.0, "nll_teacher": 3.0}
    assert report["recovered"] == {"share": 0.5, "share_per_million_tokens": 0.5, "share_per_minute": 1.0}
    assert "recovered" not in quality_metrics(curve, nll_best=4.0, nll_teacher=5.0, seconds=30.0)


def test_the_curve_has_the_start_every_step_and_the_end(tmp_path):
    curve = run_finetune(NoState(tmp_path)).curve
    assert [row.step for row in curve] == list(range(9))
    assert [row.step for row in curve if row.validation_ce is not None] == [0, 3, 6, 8]
    assert curve[-1].tokens == 8 * 2 * 2 * SEQ
    write_curve(tmp_path / "curve.csv", curve)
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert rows[0]["loss"] == ""
    assert float(rows[3]["validation_ce"]) == curve[3].validation_ce
    assert list(rows[0]) == list(CurveRow._fields)


@pytest.mark.parametrize("teacher", ["online", "cached"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch, teacher):
    options = replace(OPTIONS, teacher=teacher, ce_weight=0.5)
    undisturbed = run_finetune(NoState(tmp_path), options)

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    real_step = training._Trainer._train_step
    taken: list[int] = []

    def counted_step(trainer):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(trainer.step)
        return real_step(trainer)

    monkeypatch.setattr(training._Trainer, "_train_step", counted_step)
    with pytest.raises(KeyboardInterrupt), ResumableRun("finetune_lora", {}, []) as run:
        run_finetune(run, options)
    torch.manual_seed(12345)  # another process has another random state
    taken[:] = [-1, -1]
    monkeypatch.setattr(
        training._Trainer, "_train_step", lambda trainer: (taken.append(trainer.step), real_step(trainer))[1]
    )
    with ResumableRun("finetune_lora", {}, []) as run:
        resumed = run_finetune(run, options)

    assert taken[2:] == [3, 4, 5, 6, 7]  # from the state saved after step 3
    assert_identical(adapter(undisturbed), adapter(resumed))
    assert undisturbed.curve == resumed.curve
    timings = ("seconds", "step_seconds", "recovered")
    assert {k: v for k, v in undisturbed.metrics.items() if k not in timings} == {
        k: v for k, v in resumed.metrics.items() if k not in timings
    }


def test_a_run_killed_after_its_last_step_only_finishes(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    run = ResumableRun("finetune_lora", {}, [])
    with run:
        first = adapter(run_finetune(run))
        killed = shutil.copytree(run.directory, tmp_path / "killed")
    shutil.copytree(killed, run.directory)
    monkeypatch.setattr(training._Trainer, "_train_step", lambda trainer: pytest.fail("trained again"))
    with ResumableRun("finetune_lora", {}, []) as run:
        assert_identical(first, adapter(run_finetune(run)))


def test_dropout_and_order_follow_the_seed_and_not_the_process(tmp_path):
    torch.manual_seed(1)
    first = run_finetune(NoState(tmp_path))
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert_identical(adapter(first), adapter(run_finetune(NoState(tmp_path))))
    torch.random.set_rng_state(before)
    without_dropout = adapter(run_finetune(NoState(tmp_path), replace(OPTIONS, dropout=0.0)))
    assert any(not torch.equal(tensor, without_dropout[name]) for name, tensor in adapter(first).items())


def test_accumulation_is_a_larger_batch(tmp_path):
    parts = run_finetune(NoState(tmp_path), replace(OPTIONS, dropout=0.0, batch_size=1, accumulation=4))
    whole = run_finetune(NoState(tmp_path), replace(OPTIONS, dropout=0.0, batch_size=4, accumulation=1))
    for left, right in zip(parts.curve[1:], whole.curve[1:], strict=True):
        assert left.loss == pytest.approx(right.loss, rel=1e-3)


@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"gradient_clip": 0.01}], ids=str)
def test_an_option_of_the_optimizer_reaches_it(tmp_path, change):
    plain, changed = (adapter(run_finetune(NoState(tmp_path), replace(OPTIONS, **one))) for one in ({}, change))
    assert all(not torch.equal(changed[name], tensor) for name, tensor in plain.items())


def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(tmp_path, monkeypatch):
    passes = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: passes.append(1) or forward(self, x))
    plain = run_finetune(NoState(tmp_path))
    once = len(passes)
    recomputed = run_finetune(NoState(tmp_path), replace(OPTIONS, gradient_checkpointing=True))
    assert len(passes) - once > once
    for left, right in zip(plain.curve[1:], recomputed.curve[1:], strict=True):
        assert left.loss == pytest.approx(right.loss, rel=1e-4)


def test_without_a_teacher_there_is_cross_entropy_alone(tmp_path):
    result = run_finetune(NoState(tmp_path), replace(OPTIONS, teacher="none", ce_weight=1.0))
    assert all(row.distillation == 0 and row.loss == row.ce for row in result.curve[1:])
    assert result.metrics["validation"]["nll_teacher"] > 0


def test_a_bfloat16_base_has_a_float32_adapter(tmp_path):
    dense = tiny()
    student = pruned(dense).to(torch.bfloat16)
    options = replace(OPTIONS, ce_weight=1.0, seed=0)
    result = finetune(
        student, dense.to(torch.bfloat16), windows(5, 1), windows(3, 2), options, Process(CPU), NoState(tmp_path)
    )
    assert {p.dtype for p in adapter(result).values()} == {torch.float32}
    assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert result.curve[-1].loss < result.curve[1].loss


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    student = pruned(tiny())
    with torch.no_grad():
        student.model.norm.weight[0] = float("inf")
    with pytest.raises(DivergedError, match=r"step 1; lower finetune_lora\.learning_rate"):
        run_finetune(NoState(tmp_path), student=student)


def test_inputs_that_do_not_fit_are_named(tmp_path):
    dense = tiny()
    rest = (OPTIONS, Process(CPU), NoState(tmp_path))
    with pytest.raises(ValueError, match=r"finetune_validation_ids: expected .* found \[0, 16\]"):
        finetune(pruned(dense), dense, windows(5, 1), windows(0, 1), *rest)
    with pytest.raises(ValueError, match="token 128 is outside"):
        finetune(pruned(dense), dense, windows(5, 1) * 0 + VOCAB, windows(1, 1), *rest)
    with pytest.raises(ValueError, match="float16"):
        finetune(pruned(dense).half(), dense, windows(5, 1), windows(1, 1), *rest)


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_cached_states_are_the_online_ones_and_are_computed_once(tmp_path, monkeypatch):
    model, ids = tiny(), windows(6, 1)
    online = Teacher(model, ids)
    cached = CachedTeacher(online, {4, 1, 2}, 2, tmp_path / "states.bin", Process(CPU))
    allocated = (tmp_path / "states.bin").stat()
    assert allocated.st_blocks * 512 >= allocated.st_size, "no room was reserved: a full disk would end the process"
    torch.testing.assert_close(cached.hidden([2, 4]), online.hidden([2, 4]))
    torch.testing.assert_close(online.hidden([4]) @ online.head.T, model(ids[[4]].long()).logits[0])
    monkeypatch.setattr(online, "hidden", lambda windows: pytest.fail("computed again"))
    again = CachedTeacher(online, {1, 2, 4}, 2, tmp_path / "states.bin", Process(CPU))
    expected = cached.hidden([1])
    assert torch.equal(again.hidden([1]), expected)
    monkeypatch.undo()
    (tmp_path / "states.bin").unlink()  # to make room; the mark that it is complete stays
    anew = CachedTeacher(online, {1, 2, 4}, 2, tmp_path / "states.bin", Process(CPU))
    assert torch.equal(anew.hidden([1]), expected)


@pytest.mark.parametrize("complete", [False, True])
def test_processes_that_split_the_teacher_take_equal_turns(tmp_path, complete):
    """Also one that has fewer windows than another, or whose file is complete: else the others' forwards hang."""

    class Turns(World):
        def max_(self, tensor):
            return tensor.clamp_min(5)  # what another process has to compute

    process = Process(CPU, Turns(), sharded=True)
    online, path = Teacher(tiny(), windows(6, 1)), tmp_path / "states.bin"
    expected = CachedTeacher(online, {4, 1, 2}, 2, path, Process(CPU)).hidden([1, 2, 4])
    if not complete:
        path.with_suffix(".done").unlink()
    real, calls = online.hidden, []
    online.hidden = lambda chosen: calls.append(chosen) or real(chosen)
    cached = CachedTeacher(online, {4, 1, 2}, 2, path, process)
    assert len(calls) == 5
    assert torch.equal(cached.hidden([1, 2, 4]), expected)


def test_states_of_an_interrupted_caching_are_not_trusted(tmp_path):
    online = Teacher(tiny(), windows(6, 1))
    real, calls = online.hidden, []

    def killed(chosen):
        calls.append(chosen)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(chosen)

    online.hidden = killed
    with pytest.raises(KeyboardInterrupt):
        CachedTeacher(online, range(6), 2, tmp_path / "states.bin", Process(CPU))
    online.hidden = real
    again = CachedTeacher(online, range(6), 2, tmp_path / "states.bin", Process(CPU))
    assert torch.equal(again.hidden([4, 5]), real([4, 5]))


# --- the adapter ----------------------------------------------------------------------------------------------------


def test_targets_are_linear_modules_and_never_the_head():
    model = pruned(tiny())
    assert len(target_names(model, "all-linear")) == 14
    assert target_names(model, ["v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    for wrong in ("lm_head", "w1"):
        with pytest.raises(ValueError, match=rf"finetune_lora\.targets names '{wrong}'"):
            target_names(model, ["q_proj", wrong])


def trained_adapter(student: PreTrainedModel, directory: Path, options: RecoveryOptions) -> PeftModel:
    """An adapter that changes the output, as if trained, saved."""
    model = add_lora(student, options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, directory, base_model="artifacts/compact")
    return model.eval()


def test_dropped_heads_and_units_of_a_padded_model_stay_zero(tmp_path):
    student = tiny()
    attention, mlp = student.model.layers[0].self_attn, student.model.layers[0].mlp
    with torch.no_grad():
        for rows in (attention.q_proj.weight[32:], attention.k_proj.weight[16:], attention.v_proj.weight[16:]):
            rows.zero_()
        attention.o_proj.weight[:, 32:] = 0
        mlp.gate_proj.weight[40:] = mlp.up_proj.weight[40:] = 0
        mlp.down_proj.weight[:, 40:] = 0
    before = copy.deepcopy(student)
    after = run_finetune(NoState(tmp_path), replace(OPTIONS, learning_rate=0.01), student).model.merge_and_unload()
    for name, weight in before.named_parameters():
        if "layers.0." in name and "_proj" in name:
            changed = after.get_parameter(name) != weight
            assert changed.any(), name
            assert not changed[(weight == 0).all(1)].any(), name
            assert not changed[:, (weight == 0).all(0)].any(), name


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_merged_directory_computes_what_the_adapter_did(tmp_path, kind):
    original = pruned(tiny())
    # Stands in for the compact directory: two shards, code and tokenizer beside them.
    original.save_pretrained(tmp_path / "compact", max_shard_size="100KB")
    (tmp_path / "compact" / "modeling_compact.py").write_text("# custom code\n")
    (tmp_path / "compact" / "tokenizer.json").write_text("{}")
    ids = windows(2, 3).long()
    model = trained_adapter(copy.deepcopy(original), tmp_path / "lora", replace(OPTIONS, **kind))
    with torch.no_grad():
        expected, untouched = model(ids).logits, original(ids).logits
    assert (expected - untouched).abs().max() > 0.1

    merged = merge_adapter(copy.deepcopy(original), tmp_path / "lora")
    save_like(merged, tmp_path / "compact", tmp_path / "finetuned")
    names = sorted(path.name for path in (tmp_path / "compact").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "finetuned").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 1

    reloaded = copy.deepcopy(original)
    state = {}
    for path in (tmp_path / "finetuned").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    reloaded.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_saved_like_a_tied_bfloat16_directory(tmp_path):
    model = tiny("llama_tied").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "compact")
    save_like(model.float(), tmp_path / "compact", tmp_path / "finetuned")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "finetuned")
    assert_identical(model.to(torch.bfloat16).state_dict(), reloaded.state_dict())
    weights = (tmp_path / kind / "model.safetensors" for kind in ("compact", "finetuned"))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_model_of_other_tensors_is_refused(tmp_path):
    pruned(tiny()).save_pretrained(tmp_path / "compact")
    with pytest.raises(CheckpointMismatchError, match=r"down_proj.weight' is \[64, 48\] here, and \[64, 96\]"):
        save_like(tiny(), tmp_path / "compact", tmp_path / "finetuned")
    wider = pruned(tiny())
    wider.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointMismatchError, match=r"no such tensor as 'extra\.weight'"):
        save_like(wider, tmp_path / "compact", tmp_path / "finetuned")


def test_adapter_files_are_the_same_for_the_same_inputs(tmp_path):
    for name in ("first", "second"):
        trained_adapter(pruned(tiny()), tmp_path / name, OPTIONS)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "artifacts/compact"


def test_a_fresh_adapter_changes_nothing():
    model = pruned(tiny())
    ids = windows(2, 3).long()
    with torch.no_grad():
        before = hidden_states(model, ids)
        assert torch.equal(hidden_states(add_lora(model, OPTIONS).get_base_model().eval(), ids), before)


def test_a_fresh_adapter_follows_its_seed():
    one, same, other = (
        {
            name: p
            for name, p in add_lora(pruned(tiny()), replace(OPTIONS, seed=seed)).named_parameters()
            if "lora_A" in name
        }
        for seed in (7, 7, 8)
    )
    assert_identical(one, same)
    assert all(not torch.equal(p, other[name]) for name, p in one.items())


# --- parameters -----------------------------------------------------------------------------------------------------

PARAMS = """
seed: 0
finetune_lora:
  enabled: true
  rank: 16
  alpha: 32
  dropout: 0.0
  targets: all-linear
  use_dora: false
  use_rslora: false
  teacher: online
  distillation: kl
  distillation_weight: 1.0
  ce_weight: 0.1
  temperature: 1.0
  top_k: null
  learning_rate: 1e-3
  weight_decay: 0.0
  warmup: 0.05
  decay: cosine
  gradient_clip: 1.0
  batch_size: 1
  accumulation: 1
  steps: 180
  epochs: null
  gradient_checkpointing: false
  validate_every: 60
  save_every: 30
"""


def load_params(tmp_path: Path, *changes: tuple[str, str]) -> FinetuneLoraParams:
    text = PARAMS
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "params.yaml").write_text(text)
    return FinetuneLoraParams.load(tmp_path / "params.yaml")


def test_parameters_are_the_options_of_the_core(tmp_path):
    params = load_params(tmp_path, ("targets: all-linear", "targets: [q_proj, v_proj]"))
    assert params.options == replace(
        OPTIONS, seed=0, rank=16, alpha=32.0, dropout=0.0, targets=["q_proj", "v_proj"], ce_weight=0.1,
        learning_rate=1e-3, warmup=0.05, batch_size=1, accumulation=1, steps=180, validate_every=60, save_every=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: null", "epochs: 2"), "exactly one"),
        (("steps: 180", "steps: null"), "exactly one"),
        (("targets: all-linear", "targets: [lm_head]"), "targets = ['lm_head']: give all-linear, or a list"),
        (("targets: all-linear", "targets: []"), "targets = []: give all-linear, or a list"),
        (("teacher: online", "teacher: offline"), "finetune_lora.teacher = 'offline'"),
        (("dropout: 0.0", "dropout: 1.0"), "finetune_lora.dropout = 1.0"),
        (("seed: 0\nfine", "seed: -1\nfine"), "seed = -1"),
        (("save_every: 30", "max_seconds: 30"), "finetune_lora.max_seconds: unknown key"),
        (("save_every: 30", "max_seconds: 30"), "finetune_lora.save_every: missing"),
        (("ce_weight: 0.1", "ce_weight: -1"), "finetune_lora.ce_weight = -1: Input should be greater than or equal"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, change, message):
    with pytest.raises(ParameterError) as error:
        load_params(tmp_path, change)
    assert message in str(error.value)


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="nothing to train on"):
        load_params(tmp_path, ("ce_weight: 0.1", "ce_weight: 0"), ("teacher: online", "teacher: none"))


def test_disabled_recovery_leaves_whole_but_empty_outputs(tmp_path):
    load_params(tmp_path, ("enabled: true", "enabled: false"))
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "model.safetensors").write_text("of an earlier run")
    paths = {name: tmp_path / name for name in ("compact", "dense", "calibration", "lora", "finetuned", "metrics")}
    main(**paths, curve=tmp_path / "curve.csv", params_file=tmp_path / "params.yaml")
    assert list((tmp_path / "lora").iterdir()) == []
    assert [path.name for path in (tmp_path / "finetuned").iterdir()] == ["meta.json"]
    assert json.loads((tmp_path / "metrics").read_text()) == {"enabled": 0}
    assert (tmp_path / "curve.csv").read_text().splitlines() == [",".join(CurveRow._fields)]


def test_the_stage_makes_a_loadable_model_of_uneven_layers_and_the_same_bytes_twice(tmp_path, monkeypatch):
    """Widths as pruning leaves them: a layer without attention, one without an MLP."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("TVAPRUNE_DTYPE", "bfloat16")
    dense = tiny()
    dense.save_pretrained(tmp_path / "dense")
    topology = Topology.of(dense.config)
    masks = random_masks(topology, seed=0)
    masks.keep["intermediate"][1] = False
    masks.keep["kv_heads"][:] = torch.tensor([[False, False], [True, False]])
    sizes = compact(tmp_path / "dense", masks, random_update(topology, seed=0), tmp_path / "compact")
    reference = Reference("itself", windows(3, 4).long(), compact_logits(tmp_path / "compact", windows(3, 4).long()))
    figures = {"sparsity_decoder": 0.5, "sparsity_model": 0.4, "params_dense": 1, "params_kept": sizes.parameters_kept}
    made_with = {"compact": {"gguf": None}}
    made = Provenance(
        Base.of(tmp_path / "dense"),
        "uneven",
        {axis: kept.tolist() for axis, kept in masks.widths().items()},
        made_with,
        figures,
    )
    certify(tmp_path / "compact", reference, 1e-3, made)
    ids = {"finetune_ids": windows(5, 1), "finetune_validation_ids": windows(3, 2)}
    write_artifact(tmp_path / "calibration", "calibration", ids)
    load_params(tmp_path, ("steps: 180", "steps: 6"), ("validate_every: 60", "validate_every: 2"))

    inputs = {name: tmp_path / name for name in ("compact", "dense", "calibration")}
    outputs = []
    for run in ("first", "second"):
        folder = tmp_path / run
        paths = {"lora": folder / "lora", "finetuned": folder / "finetuned", "metrics": folder / "finetune.json"}
        main(**inputs, **paths, curve=folder / "finetune.csv", params_file=tmp_path / "params.yaml")
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "finetune.json")
        assert all(check.passed for check in verify(folder / "finetuned"))
        made = Provenance.read(folder / "finetuned")
        assert made.made_with.keys() == {"compact", "finetune_lora"}
        assert f"{made.figures['finetuned_nll_best']:.3f}" in (folder / "finetuned" / "README.md").read_text()
        outputs.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert outputs[0] == outputs[1]

    prompt = windows(2, 9).long()
    with torch.no_grad():
        recovered, pruned_model = load(tmp_path / "first" / "finetuned"), load(tmp_path / "compact")
        assert (recovered(prompt).logits - pruned_model(prompt).logits).abs().max() > 1e-3
        adapter_on_compact = PeftModel.from_pretrained(pruned_model, str(tmp_path / "first" / "lora")).eval()
        torch.testing.assert_close(recovered(prompt).logits, adapter_on_compact(prompt).logits, rtol=1e-4, atol=1e-4)
    assert recovered.dtype == pruned_model.dtype == torch.float32
