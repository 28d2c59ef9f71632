"""What computes on a GPU, against the CPU: `pytest -m gpu` on a machine that has one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_model
from tests.unit.test_finetune import OPTIONS, adapter, assert_identical, run_finetune
from tests.unit.test_gates import DETERMINISTIC, PAPER, TVA, WINDOWS, Memory
from tests.unit.test_latency import VOCAB, build, build_pruned, build_sliding, build_uneven
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.sharding import shard_layers
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.random_model import random_models
from tvaprune.cost import peak_memory_bytes
from tvaprune.distributed import Process, World
from tvaprune.gates.memory import training_memory
from tvaprune.gates.training import Learned, learn_gates, new_gates
from tvaprune.masks.latency_table import PHASES
from tvaprune.measures import latency, machine
from tvaprune.measures.block_times import Candidates, layers_to_time, time_blocks
from tvaprune.measures.perplexity import nll_by_window
from tvaprune.methods import find_masks
from tvaprune.options.axes import AXES
from tvaprune.options.gates import GateOptions
from tvaprune.options.masks import METHOD_OPTIONS, MaskRequest
from tvaprune.recovery.memory import finetuning_memory
from tvaprune.recovery.training import finetune
from tvaprune.resume import NoState
from tvaprune.runtime import passes
from tvaprune.runtime.packed import Runtime, prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def learned(options: GateOptions, device: torch.device, saver: Any = None) -> Learned:
    model = tiny_model("llama").to(device)
    gates = new_gates(Topology.of(model.config), options, 0.4, AXES, device, seed=0)
    return learn_gates(model, WINDOWS, gates, saver, progress=False)


def test_gates_learned_on_a_gpu_are_those_of_the_cpu() -> None:
    """Without what is sampled, where a rounding is enough to draw another token."""
    here, there = learned(DETERMINISTIC, CPU), learned(DETERMINISTIC, CUDA)
    for axis in AXES:
        assert torch.equal(here.masks.keep[axis], there.masks.keep[axis])
        torch.testing.assert_close(here.masks.score[axis], there.masks.score[axis], rtol=0, atol=1e-3)
        torch.testing.assert_close(here.update.scale[axis], there.update.scale[axis], rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [TVA, PAPER], ids=["tva", "paper"])
def test_sampled_gates_meet_the_budget_and_resume(options: GateOptions) -> None:
    undisturbed = learned(options, CUDA).masks
    topology = Topology.of(tiny_model("llama").config)
    assert 0.4 <= sparsity(topology, undisturbed.widths()) < 0.402
    killed = Memory(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        learned(options, CUDA, killed)
    resumed = learned(options, CUDA, killed).masks
    for axis in AXES:
        assert torch.equal(undisturbed.keep[axis], resumed.keep[axis])
        torch.testing.assert_close(undisturbed.score[axis], resumed.score[axis], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_runs_on_a_gpu(method: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(CUDA, dtype)
    options = {"tva": replace(TVA, steps=8), "paper": replace(PAPER, steps=8)}.get(method, METHOD_OPTIONS[method]())
    request = MaskRequest(method, options, 0.3, ("intermediate", "kv_heads"))
    found = find_masks(model, WINDOWS, WINDOWS[:2], request, progress=False)
    assert sparsity(Topology.of(model.config), found.masks.widths()) == pytest.approx(0.3, abs=0.005)
    assert found.peak_memory_bytes > 0


@pytest.mark.parametrize("teacher", ["online", "cached", "none"])
def test_fine_tuning_on_a_gpu_is_that_of_the_cpu(tmp_path: Path, teacher: Any) -> None:
    options = replace(OPTIONS, dropout=0.0, teacher=teacher, ce_weight=0.5, distillation_weight=0.5)
    (tmp_path / "cpu").mkdir()
    here = run_finetune(NoState(tmp_path / "cpu"), options, device=CPU)
    there = run_finetune(NoState(tmp_path), options, device=CUDA)
    assert here.metrics["validation"] == pytest.approx(there.metrics["validation"], rel=1e-4)
    again = run_finetune(NoState(tmp_path), options, device=CUDA)
    assert_identical(adapter(there), adapter(again))


def test_layers_split_over_a_group_of_one_learn_the_same(tmp_path: Path) -> None:
    options = replace(DETERMINISTIC, steps=8)
    whole = learned(options, CUDA).masks
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        model = shard_layers(tiny_model("llama"), device, 1)
        topology = Topology.of(model.config)
        gates = new_gates(topology, options, 0.4, AXES, device, seed=0)
        split = learn_gates(model, WINDOWS, gates, progress=False, world=World(0, 1)).masks
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
    phases = latency.compare(models, [1, 2], latency.Benchmark(12, 5, 3, 3, 2), runtime)
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
    times = time_blocks(by_width, 2, latency.Benchmark(8, 4, 3, 3, 2), runtime)
    layers = len(layers_to_time(widths)[0])
    for phase in PHASES:
        for rounds in times[phase].values():
            assert rounds.shape == (3, 2 * layers + 1)
            assert (rounds > 0).all()


def test_perplexity_is_that_of_the_cpu() -> None:
    here = nll_by_window(tiny_model("llama"), WINDOWS.long(), 4)
    there = nll_by_window(tiny_model("llama").to(CUDA), WINDOWS.long(), 4).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("checkpointing", "teacher"), [(False, "online"), (True, "cached")])
def test_the_memory_estimates_are_near_what_is_allocated(tmp_path: Path, checkpointing: bool, teacher: Any) -> None:
    """Layers, vocabulary and windows as large as an 8B model's; four layers of them."""
    config = load_config(Path("configs/models/Meta-Llama-3-8B"))
    config.num_hidden_layers, dtype = 4, torch.bfloat16
    ids = torch.randint(config.vocab_size, (4, 512), generator=torch.Generator().manual_seed(0))
    gates = replace(TVA, steps=2, batch_size=2, curvature_windows=2, curvature_tokens=32)
    (student,) = random_models(config, [LayerWidths(3712, [12544] * 4, [7] * 4)], dtype, CPU)
    with CUDA:
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    torch.cuda.reset_peak_memory_stats()
    request = MaskRequest("tva", gates, 0.2, gradient_checkpointing=checkpointing)
    find_masks(dense, ids, ids[:1], request, progress=False)
    expected = training_memory(config, gates, 512, dtype, "cuda", checkpointing)["total"]
    assert 0.9 < torch.cuda.max_memory_allocated() / expected < 1.1

    dense.eval().to(CPU)
    options = replace(
        OPTIONS, rank=32, alpha=64, dropout=0.0, teacher=teacher, ce_weight=1.0, steps=2, accumulation=1,
        learning_rate=1e-4, warmup=0.0, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    expected = finetuning_memory(student.config, config, options, 512, dtype, "cuda")["total"]
    torch.cuda.reset_peak_memory_stats()
    finetune(student, dense, ids, ids[:1], options, Process(CUDA), NoState(tmp_path))
    assert 0.9 < torch.cuda.max_memory_allocated() / expected < 1.1
