import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.tiny_models import tiny_model
from tvaprune.checkpoint.modeling_tvaprune import TvaPruneConfig, TvaPruneForCausalLM
from tvaprune.cost import peak_memory_bytes
from tvaprune.measures import latency, machine, speed_report
from tvaprune.runtime import passes

HIDDEN, HEAD_DIM, VOCAB = 64, 16, 128


def build(tied: bool = False) -> PreTrainedModel:
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCAB}
    return tiny_model("llama", layers=2, initializer_range=0.3, tie_word_embeddings=tied, eos_token_id=None, **sizes)


def build_uneven() -> PreTrainedModel:
    """Layer 0 with 40 intermediate units, layer 1 with 1 kv head (2 query heads)."""
    model = build()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.gate_proj, mlp.up_proj = nn.Linear(HIDDEN, 40, bias=False), nn.Linear(HIDDEN, 40, bias=False)
    mlp.down_proj = nn.Linear(40, HIDDEN, bias=False)
    attention.q_proj, attention.o_proj = nn.Linear(HIDDEN, 32, bias=False), nn.Linear(32, HIDDEN, bias=False)
    attention.k_proj, attention.v_proj = nn.Linear(HIDDEN, 16, bias=False), nn.Linear(HIDDEN, 16, bias=False)
    return model


def build_pruned() -> PreTrainedModel:
    """The compact model's own class: layer 0 empty, layer 1 with 1 kv head and 40 intermediate units."""
    torch.manual_seed(0)
    base = build().config.to_dict()
    config = TvaPruneConfig("llama", base, HIDDEN, intermediate_sizes=[0, 40], kv_head_counts=[0, 1])
    return TvaPruneForCausalLM(config).eval()


def build_sliding() -> PreTrainedModel:
    """With a window as wide as the tests' tokens: nothing slides yet."""
    return tiny_model("mistral", layers=2, initializer_range=0.3, eos_token_id=None, sliding_window=27)


@pytest.mark.parametrize("make", [build, build_uneven, build_pruned, build_sliding])
@torch.inference_mode()
def test_decode_is_generate(make: Any) -> None:
    model = make()
    prompt = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=17, do_sample=False)
    token, cache = passes.prefill(model, prompt)
    found = torch.cat([token, passes.decode(model, token, cache, position=11, steps=16)], dim=1)
    assert found.tolist() == expected[:, 11:].tolist()
    assert len(set(found.flatten().tolist())) > 3  # the models do not just repeat one token
    assert cache.get_seq_length() == 11 + 16


@pytest.mark.parametrize("make", [build, build_uneven, build_pruned, build_sliding])
@torch.inference_mode()
def test_a_step_of_fixed_shapes_decodes_the_same_tokens_each_time(make: Any) -> None:
    """What a CUDA graph records, run here as it is; tests/unit/test_cuda.py runs the graph."""
    model = make()
    prompt = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(2))
    eager = passes.Decoding(model, prompt, 16)
    eager.start()
    expected = eager.run()
    fixed = passes.RecordedDecoding(model, prompt, 16, record=lambda step: step)
    for _ in range(2):
        fixed.start()
        assert fixed.run().tolist() == expected.tolist()
    read = passes.recorded_prefill(model, prompt, record=lambda work: work)
    assert read()[0].tolist() == passes.prefill(model, prompt)[0].tolist()


def test_graphs_refuse_a_sliding_window_that_the_tokens_leave() -> None:
    model = tiny_model("mistral", sliding_window=12)
    prompt = torch.zeros(1, 8, dtype=torch.int64)
    passes.RecordedDecoding(model, prompt, 4, record=lambda step: step)
    with pytest.raises(ValueError, match=r"13 tokens are more than .* window of 12"):
        passes.RecordedDecoding(model, prompt, 5, record=lambda step: step)
    with pytest.raises(ValueError, match=r"16 tokens are more than .* window of 12"):
        passes.recorded_prefill(model, prompt.repeat(1, 2), record=lambda work: work)


def linear_flops(pairs: list[tuple[int, int]]) -> int:
    return sum(2 * rows * columns for rows, columns in pairs)


def test_prefill_flops_equal_a_hand_count() -> None:
    batch, tokens = 3, 20
    causal_pairs = tokens * (tokens + 1) // 2
    head = 2 * HIDDEN * VOCAB * batch  # the last position's alone

    layer = linear_flops([(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)])
    attention = 4 * 4 * HEAD_DIM * causal_pairs
    expected = batch * 2 * (layer * tokens + attention) + head
    assert latency.prefill_flops(build(), batch, tokens) == expected

    layer_0 = linear_flops([(64, 64), (64, 32), (64, 32), (64, 64), (64, 40), (64, 40), (40, 64)])
    layer_1 = linear_flops([(64, 32), (64, 16), (64, 16), (32, 64), (64, 96), (64, 96), (96, 64)])
    attention = 4 * (4 + 2) * HEAD_DIM * causal_pairs
    expected = batch * ((layer_0 + layer_1) * tokens + attention) + head
    assert latency.prefill_flops(build_uneven(), batch, tokens) == expected

    layer = linear_flops([(64, 32), (64, 16), (64, 16), (32, 64), (64, 40), (64, 40), (40, 64)])
    expected = batch * (layer * tokens + 4 * 2 * HEAD_DIM * causal_pairs) + head
    assert latency.prefill_flops(build_pruned(), batch, tokens) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_bytes_equal_a_hand_count(dtype: torch.dtype) -> None:
    batch, prompt, steps, size = 3, 10, 4, dtype.itemsize
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # projections, MLP, two norms
    weights = 2 * layer + HIDDEN + VOCAB * HIDDEN  # final norm, vocabulary product
    cached = sum(prompt + step for step in (1, 2, 3, 4)) / 4
    cache = cached * 2 * 2 * (2 * HEAD_DIM)  # layers, keys and values, kv heads
    expected = size * (weights + batch * HIDDEN + batch * cache)
    assert latency.decode_bytes(build().to(dtype), batch, prompt, steps) == expected
    assert latency.decode_bytes(build(tied=True).to(dtype), batch, prompt, steps) == expected

    dropped = 3 * 64 * 56 + 2 * 64 * 32 + 2 * 64 * 16
    cache = cached * 2 * (2 + 1) * HEAD_DIM
    expected = size * (weights - dropped + batch * HIDDEN + batch * cache)
    assert latency.decode_bytes(build_uneven().to(dtype), batch, prompt, steps) == expected


def recorder(values: dict[str, list[float]]) -> tuple[dict[str, Any], list[str]]:
    """Probes that note when they are called and return the next value (the last one for ever)."""
    calls: list[str] = []

    def probe(name: str) -> Any:
        def measure() -> float:
            calls.append(name)
            return values[name][min(calls.count(name), len(values[name])) - 1]

        return measure

    return {name: probe(name) for name in values}, calls


def test_models_alternate_and_the_order_rotates() -> None:
    probes, calls = recorder({"dense": [1.0], "compact": [2.0], "finetuned": [3.0]})
    result = latency.interleave(probes, repeats=4, max_warmup=9)
    rounds = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert len(rounds) == 2 + 4  # two equal warm-up rounds are enough
    assert all(set(one) == {"dense", "compact", "finetuned"} for one in rounds)
    assert [one[0] for one in rounds[2:]] == ["dense", "compact", "finetuned", "dense"]
    assert result == {"dense": [1.0] * 4, "compact": [2.0] * 4, "finetuned": [3.0] * 4}


def test_warmup_goes_on_until_all_are_stable_and_is_not_counted() -> None:
    probes, calls = recorder({"dense": [9.0, 9.0, 9.0, 9.1, 8.0], "compact": [7.0, 5.0, 4.0, 4.1, 3.0]})
    result = latency.interleave(probes, repeats=3, max_warmup=9)
    assert len(calls) == 2 * (4 + 3)
    assert result["dense"] == [8.0] * 3
    assert result["compact"] == [3.0] * 3

    probes, calls = recorder({"dense": [2.0**-number for number in range(20)]})
    latency.interleave(probes, repeats=3, max_warmup=5)
    assert len(calls) == 5 + 3


def test_summary_of_known_latencies() -> None:
    phase = latency.PhaseTimes(
        latency_ms={"dense": [10.0, 20.0, 30.0, 40.0, 50.0], "compact": [10.0, 10.0, 20.0, 10.0, 50.0]},
        tokens=60,
        work={"dense": 8.0, "compact": 2.0},
    )
    summary = speed_report.summarise(phase, "flops")
    assert summary["dense"] == pytest.approx(
        {"latency_ms": 30.0, "iqr_ms": 20.0, "tokens_per_s": 2000.0, "flops": 8.0, "flops_per_s": 8.0 / 0.03}
    )
    assert summary["compact"]["latency_ms"] == 10.0
    assert summary["speedup"] == 3.0
    assert summary["compact"]["speedup_paired"] == 1.5  # median of 1, 2, 1.5, 4, 1
    assert summary["limit"] == 4.0
    assert summary["efficiency"] == 0.75


def leaves(content: Any) -> list[Any]:
    return [leaf for value in content.values() for leaf in leaves(value)] if isinstance(content, dict) else [content]


def test_comparison_is_finite_numbers_under_the_documented_keys() -> None:
    models = {"dense": build(), "compact": build_uneven(), "finetuned": build_uneven()}
    phases = latency.compare(models, [2, 1], latency.Benchmark(12, 5, 3, repeats=3, max_warmup=2))
    metrics = speed_report.speed_metrics(phases)
    assert gc.isenabled()
    json.dumps(metrics, allow_nan=False)
    for value in leaves(metrics):
        assert isinstance(value, int | float)
        assert not isinstance(value, bool)
        assert math.isfinite(value)
    assert set(metrics) == {"batch", "prefill", "decode", "batch_1"}
    assert (metrics["batch"], metrics["batch_1"]["batch"]) == (2, 1)
    for phase, work in (("prefill", "flops"), ("decode", "bytes_read")):
        assert set(metrics[phase]) == {*models, "speedup", "limit", "efficiency"}
        own = {"latency_ms", "iqr_ms", "tokens_per_s", work, f"{work}_per_s"}
        assert set(metrics[phase]["dense"]) == own
        assert set(metrics[phase]["finetuned"]) == own | {"speedup_paired"}
        assert metrics[phase]["limit"] > 1
        assert metrics[phase]["compact"]["latency_ms"] > 0


def test_a_decode_is_timed_a_step_and_nothing_is_collected_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []

    def thirty(_: torch.device, work: Any) -> float:
        collected.append(gc.isenabled())
        work()
        return 30.0

    monkeypatch.setattr(latency, "_milliseconds", thirty)
    benchmark = latency.Benchmark(12, decode_prompt_tokens=5, decode_tokens=3, repeats=4, max_warmup=2)
    prefill, decode = latency.compare({"dense": build()}, [2], benchmark)[2]
    assert (prefill.latency_ms, prefill.tokens) == ({"dense": [30.0] * 4}, 2 * 12)
    assert (decode.latency_ms, decode.tokens) == ({"dense": [10.0] * 4}, 2)
    assert collected == [False] * 2 * (2 + 4)


def test_models_that_were_timed_apart_have_the_same_figures() -> None:
    """The order of rounds differs, not what is counted."""
    models, benchmark = {"dense": build(), "compact": build_uneven()}, latency.Benchmark(12, 5, 3, 3, 2)
    at_once = speed_report.speed_metrics(latency.compare(models, [2, 1], benchmark))
    alone = latency.together(latency.compare({name: model}, [2, 1], benchmark) for name, model in models.items())
    apart = speed_report.speed_metrics(alone)
    for phase, work in (("prefill", "flops"), ("decode", "bytes_read")):
        for name in models:
            assert apart[phase][name][work] == at_once[phase][name][work]
            assert apart[phase][name]["latency_ms"] > 0
        assert apart[phase]["limit"] == at_once[phase]["limit"]
        assert apart[phase]["compact"]["speedup_paired"] > 0


def test_checkpoint_size_counts_weights_alone(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    parameters = 4 * sum(weight.numel() for weight in model.parameters())
    assert parameters <= latency.checkpoint_bytes(tmp_path) < parameters + 10_000


def test_load_timing_returns_every_model() -> None:
    calls = {"dense": 0, "compact": 0}

    def loader(name: str) -> Any:
        def load() -> Any:
            calls[name] += 1
            return tiny_model("llama", seed=calls[name], layers=1)

        return load

    models, seconds = latency.load_timed({name: loader(name) for name in calls})
    assert calls == {"dense": 2, "compact": 2}  # the first load, cold, is not the timed one
    second = tiny_model("llama", seed=2, layers=1).state_dict()
    assert all(torch.equal(models["compact"].state_dict()[name], tensor) for name, tensor in second.items())
    assert set(seconds) == {"dense", "compact"}
    assert all(value >= 0 for value in seconds.values())


def test_the_limit_is_the_plain_models_under_every_runtime() -> None:
    """Packed weights are no parameters: counted after packing, decoding would read next to nothing."""
    limits = []
    for runtime in ("eager", "packed"):
        models = {"dense": build(), "compact": build_uneven()}
        phases = latency.compare(models, [1], latency.Benchmark(6, 5, 2, repeats=3, max_warmup=2), runtime)
        limits.append([phase.work for phase in phases[1]])
    assert limits[0] == limits[1]
    assert limits[0][1]["dense"] > sum(weight.nbytes for weight in build().parameters()) / 2


def test_every_round_is_a_row(tmp_path: Path) -> None:
    phase = latency.PhaseTimes(latency_ms={"dense": [3.0, 4.0], "compact": [1.0, 2.0]}, tokens=1, work={})
    speed_report.write_rounds(tmp_path / "speed.csv", {2: (phase, phase)}, {"machine": "a, b"})
    lines = (tmp_path / "speed.csv").read_text().splitlines()
    assert lines[0] == "repeat,batch,phase,model,latency_ms,machine"
    assert lines[2] == '1,2,prefill,dense,4.0,"a, b"'
    assert len(lines) == 1 + 2 * 2 * 2


def test_each_core_comes_once_before_any_comes_twice(tmp_path: Path) -> None:
    """Packages number their cores alike; of processor 9 the system says nothing."""
    for processor, package, core in ((0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 1, 0), (4, 0, 1)):
        directory = tmp_path / f"cpu{processor}" / "topology"
        directory.mkdir(parents=True)
        (directory / "physical_package_id").write_text(f"{package}\n")
        (directory / "core_id").write_text(f"{core}\n")
    assert machine.one_a_core({4, 3, 2, 1, 0, 9}, tmp_path) == [0, 2, 3, 9, 1, 4]


def test_the_machine_is_numbers_and_a_name() -> None:
    numbers = machine.machine_numbers(torch.device("cpu"))
    assert numbers["threads"] == torch.get_num_threads()
    assert numbers["processors"] >= 1
    assert numbers["read_bytes_per_s"] > 1e8
    assert machine.machine_name(torch.device("cpu"))
    assert peak_memory_bytes(torch.device("cpu")) > 1e8
