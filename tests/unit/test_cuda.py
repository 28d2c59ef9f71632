"""What computes on a GPU, against the CPU: `pytest -m gpu` on a machine that has one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_model
from tests.unit.test_finetune import LORA, NoState, adapter, assert_identical, run_finetune
from tests.unit.test_gates import PAPER, SETTINGS, TRACKED, WINDOWS, Memory
from tests.unit.test_latency import VOCAB, build, build_pruned, build_sliding, build_uneven
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.sharding import shard_layers
from tvaprune.architecture.topology import AXES, Topology
from tvaprune.baselines.registry import BASELINES
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.random_model import LayerWidths, random_models
from tvaprune.cost import peak_memory_bytes
from tvaprune.distributed import World
from tvaprune.gates.memory import training_memory
from tvaprune.gates.state import GateTraining
from tvaprune.gates.training import learn_gates
from tvaprune.masks.latency_table import PHASES
from tvaprune.masks.masks import Masks
from tvaprune.measures import latency, machine
from tvaprune.measures.block_times import Candidates, Lengths, layers_to_time, time_blocks
from tvaprune.measures.perplexity import evaluate
from tvaprune.methods import find_masks
from tvaprune.recovery.lora import LoraSettings
from tvaprune.recovery.memory import finetuning_memory
from tvaprune.recovery.schedule import Schedule
from tvaprune.recovery.training import Objective, finetune
from tvaprune.runtime import passes
from tvaprune.runtime.packed import Runtime, prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def learned(settings: GateTraining, device: torch.device, **others: Any) -> Masks:
    model = tiny_model("llama").to(device)
    return learn_gates(model, Topology.of(model.config), WINDOWS, 0.4, settings, progress=False, **others).masks


@pytest.mark.parametrize("constraint", ["budget", "lagrangian"])
def test_gates_learned_on_a_gpu_are_those_of_the_cpu(constraint: str) -> None:
    """Without what is sampled, where a rounding is enough to draw another token."""
    settings = replace(SETTINGS if constraint == "budget" else PAPER, init="constant", noise=0.0)
    here, there = learned(settings, CPU), learned(settings, CUDA)
    for axis in AXES:
        assert torch.equal(here.keep[axis], there.keep[axis])
        torch.testing.assert_close(here.log_alpha[axis], there.log_alpha[axis], rtol=0, atol=1e-3)
        torch.testing.assert_close(here.mu[axis], there.mu[axis], rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [TRACKED, replace(SETTINGS, noise=0.5)], ids=["tracked", "noisy"])
def test_sampled_gates_meet_the_budget_and_resume(settings: GateTraining) -> None:
    undisturbed = learned(settings, CUDA)
    topology = Topology.of(tiny_model("llama").config)
    assert 0.4 <= sparsity(topology, undisturbed.widths()) < 0.402
    killed = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        learned(settings, CUDA, saver=killed)
    resumed = learned(settings, CUDA, saver=killed)
    for axis in AXES:
        assert torch.equal(undisturbed.keep[axis], resumed.keep[axis])
        torch.testing.assert_close(undisturbed.log_alpha[axis], resumed.log_alpha[axis], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["tva", *BASELINES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_runs_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(CUDA, dtype)
    found = find_masks(
        model, WINDOWS, WINDOWS[:2], 0.3, replace(TRACKED, steps=8), None, method=method,
        axes=("intermediate", "kv_heads"), seed=0, progress=False,
    )  # fmt: skip
    assert sparsity(Topology.of(model.config), found.masks) == pytest.approx(0.3, abs=0.005)
    assert found.peak_memory_bytes > 0


@pytest.mark.parametrize("teacher", ["online", "cached", "none"])
def test_fine_tuning_on_a_gpu_is_that_of_the_cpu(tmp_path: Path, teacher: Any) -> None:
    objective = Objective(teacher=teacher, ce_weight=0.5, distillation_weight=0.5)
    lora = replace(LORA, dropout=0.0)
    (tmp_path / "cpu").mkdir()
    here = run_finetune(NoState(tmp_path / "cpu"), objective=objective, device=CPU, lora=lora)
    there = run_finetune(NoState(tmp_path), objective=objective, device=CUDA, lora=lora)
    assert here.metrics["validation"] == pytest.approx(there.metrics["validation"], rel=1e-4)
    again = run_finetune(NoState(tmp_path), objective=objective, device=CUDA, lora=lora)
    assert_identical(adapter(there), adapter(again))


def test_layers_split_over_a_group_of_one_learn_the_same(tmp_path: Path) -> None:
    settings = replace(SETTINGS, init="constant", steps=8)
    whole = learned(settings, CUDA)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        model = shard_layers(tiny_model("llama"), device, 1)
        topology = Topology.of(model.config)
        split = learn_gates(model, topology, WINDOWS, 0.4, settings, progress=False, world=World(0, 1)).masks
    finally:
        torch.distributed.destroy_process_group()
    for axis in AXES:
        assert torch.equal(whole.keep[axis], split.keep[axis])


@pytest.mark.parametrize("make", [build, build_uneven, build_pruned, build_sliding])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_recorded_graph_decodes_the_same_tokens_each_time(make: Any, dtype: torch.dtype) -> None:
    model = make().to(CUDA, dtype)
    prompt = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(2)).to(CUDA)
    fixed = passes.RecordedDecoding(model, prompt, 16, record=lambda step: step)
    fixed.start()
    expected = fixed.run().tolist()
    recorded = passes.RecordedDecoding(model, prompt, 16)
    for _ in range(2):
        recorded.start()
        assert recorded.run().tolist() == expected
    read = passes.recorded_prefill(model, prompt)
    assert read()[0].tolist() == passes.prefill(model, prompt)[0].tolist()


@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_a_comparison_is_positive_numbers(runtime: Runtime) -> None:
    models = {"dense": build().to(CUDA), "compact": build_pruned().to(CUDA)}
    phases = latency.compare(models, [1, 2], 12, 5, 3, 3, 2, runtime)
    for phase in (phase for both in phases.values() for phase in both):
        assert all(value > 0 for values in phase.latency_ms.values() for value in values)
    assert machine.machine_name(CUDA)
    assert peak_memory_bytes(CUDA) > 0


@pytest.mark.parametrize("runtime", ["eager", "graphs"])
def test_every_block_is_timed(runtime: Runtime) -> None:
    widths = Candidates([48, 64], [0, 32, 64, 96], [0, 1, 2])
    config = tiny_model("llama").config
    models = random_models(config, [LayerWidths(*each) for each in widths.by_model()], torch.bfloat16, CUDA)
    by_width = dict(zip(widths.hidden, [prepare(model, runtime) for model in models], strict=True))
    times = time_blocks(by_width, Lengths(2, 8, 4, 3), 3, 2, runtime)
    layers = len(layers_to_time(widths)[0])
    for phase in PHASES:
        for rounds in times[phase].values():
            assert rounds.shape == (3, 2 * layers + 1)
            assert (rounds > 0).all()


def test_perplexity_is_that_of_the_cpu() -> None:
    here = evaluate(tiny_model("llama"), WINDOWS.long(), 4).ppl
    assert evaluate(tiny_model("llama").to(CUDA), WINDOWS.long(), 4).ppl == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize(("checkpointing", "teacher"), [(False, "online"), (True, "cached")])
def test_the_memory_estimates_are_near_what_is_allocated(tmp_path: Path, checkpointing: bool, teacher: Any) -> None:
    """Layers, vocabulary and windows as large as an 8B model's; four layers of them."""
    config = load_config(Path("configs/models/Meta-Llama-3-8B"))
    config.num_hidden_layers, dtype = 4, torch.bfloat16
    ids = torch.randint(config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    gates = replace(TRACKED, steps=2, batch_size=2, curvature_windows=2, curvature_tokens=32)
    (student,) = random_models(config, [LayerWidths(3712, [12544] * 4, [7] * 4)], dtype, CPU)
    with CUDA:
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.cuda.reset_peak_memory_stats()
    find_masks(
        dense, ids, ids[:1], 0.2, gates, None, method="tva", axes=AXES, seed=0,
        gradient_checkpointing=checkpointing, progress=False,
    )  # fmt: skip
    expected = training_memory(config, gates, 512, dtype, "cuda", checkpointing)["total"]
    assert 0.9 < torch.cuda.max_memory_allocated() / expected < 1.1

    dense.eval().to(CPU)
    lora, objective = LoraSettings(rank=32, alpha=64), Objective(teacher=teacher)
    schedule = Schedule(
        steps=2, epochs=None, batch_size=2, accumulation=1, learning_rate=1e-4, gradient_checkpointing=checkpointing
    )
    expected = finetuning_memory(student.config, config, lora, objective, schedule, 512, dtype, "cuda")["total"]
    torch.cuda.reset_peak_memory_stats()
    finetune(
        student, dense, ids, ids[:1], lora=lora, objective=objective, schedule=schedule, seed=0, device=CUDA,
        state=NoState(tmp_path),
    )  # fmt: skip
    assert 0.9 < torch.cuda.max_memory_allocated() / expected < 1.1
