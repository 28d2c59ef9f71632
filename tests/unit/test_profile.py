"""The measured table: what is timed, its artifact, and what it predicts; timings themselves are asserted nowhere."""

import json
from pathlib import Path

import pytest
import torch
import typer
from ruamel.yaml import YAML
from typer.testing import CliRunner

from stages import adapt_dimensions, profile_hardware
from tests.tiny_models import random_masks, save_tiny_model, tiny_model
from tools import alignment_table, mask_speed
from tvaprune.architecture.parameter_counts import sparsity
from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.artifacts import ArtifactError
from tvaprune.checkpoint.random_model import random_models
from tvaprune.masks.latency_table import BLOCKS, PHASES, LatencyTable, read_table, write_table
from tvaprune.masks.masks import read_masks, write_masks
from tvaprune.masks.projection import project
from tvaprune.measures import block_times
from tvaprune.measures.block_times import Candidates, candidates, layers_to_time, table_of, time_blocks
from tvaprune.measures.latency import Benchmark
from tvaprune.runtime.packed import Runtime, prepare

CPU = torch.device("cpu")
TOPOLOGY = Topology(layers=3, hidden=64, intermediate=96, kv_heads=2, group_size=2, head_dim=16)
MADE_ON = {"layers": 3, "decode_tokens": 4, "device": "cpu", "processor": "some", "threads": 1}
WIDTHS = Candidates([48, 64], [0, 32, 64, 96], [0, 1, 2])


def table(seed: int = 0) -> LatencyTable:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> dict:
        return {phase: torch.rand(shape, generator=generator, dtype=torch.float64) for phase in PHASES}

    ms, iqr_ms = ({"rest": random(2), "attention": random(2, 3), "mlp": random(2, 4)} for _ in range(2))
    return LatencyTable(*WIDTHS, ms, iqr_ms, MADE_ON)  # type: ignore[arg-type]


def test_candidates_are_multiples_and_the_dense_widths() -> None:
    found = candidates(TOPOLOGY, 24, 40, 0.5)
    assert found == Candidates([48, 64], [0, 40, 80, 96], [0, 1, 2])
    intermediate, kv_heads = layers_to_time(found)
    assert set(intermediate) == set(found.intermediate)
    assert set(kv_heads) == set(found.kv_heads)
    assert len(intermediate) == len(kv_heads)
    assert kv_heads[0] > 0


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_models_have_the_widths_and_share_memory(family: str, dtype: torch.dtype) -> None:
    config = tiny_model(family).config
    widths = [LayerWidths(64, [96, 96, 96], [2, 2, 2]), LayerWidths(48, [0, 32], [1, 0])]
    dense, narrow = random_models(config, widths, dtype, CPU)
    assert dense.num_parameters() == tiny_model(family).num_parameters()
    assert {weight.dtype for weight in narrow.parameters()} == {dtype}
    assert narrow.model.layers[1].mlp.gate_proj.weight.shape == (32, 48)
    assert dense.model.embed_tokens.weight.data_ptr() == narrow.model.embed_tokens.weight.data_ptr()
    with torch.inference_mode():
        for model in (dense, narrow):
            assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("runtime", ["eager", "packed", "graphs"])
def test_every_block_is_timed_and_the_table_adds_up_to_the_passes(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """graphs without a GPU: the work that a CUDA graph would capture runs as it is."""
    monkeypatch.setattr(block_times, "Recording", lambda work: work)
    benchmark = Benchmark(prefill_tokens=8, decode_prompt_tokens=4, decode_tokens=3, repeats=3, max_warmup=2)
    config = tiny_model("llama").config
    models = random_models(config, WIDTHS.by_model(), torch.float32, CPU)
    prepared = [prepare(model, runtime) for model in models]
    times = time_blocks(dict(zip(WIDTHS.hidden, prepared, strict=True)), 2, benchmark, runtime)
    layers = len(layers_to_time(WIDTHS)[0])
    for phase in PHASES:
        for rounds in times[phase].values():
            assert rounds.shape == (3, 2 * layers + 1)
            assert (rounds > 0).all()
    assert not models[0].model.norm._forward_pre_hooks, "the clock is gone from the model"


def test_medians_by_width_leave_out_what_slowed_a_whole_round() -> None:
    """Blocks of known cost, each round slower or faster as a whole."""
    intermediate, kv_heads = layers_to_time(WIDTHS)
    blocks = [cost for m, k in zip(intermediate, kv_heads, strict=True) for cost in (1.0 + k, 5.0 + m)]
    for_hidden = {h: torch.tensor([*blocks, 7.0], dtype=torch.float64) * h for h in WIDTHS.hidden}
    slowed = torch.tensor([[1.0], [3.0], [1.0], [0.5], [1.0]], dtype=torch.float64)
    times = {phase: {h: slowed * one for h, one in for_hidden.items()} for phase in PHASES}
    found = table_of(times, WIDTHS, {"layers": 3})  # type: ignore[arg-type]
    hidden = torch.tensor(WIDTHS.hidden, dtype=torch.float64)[:, None]
    torch.testing.assert_close(found.ms["rest"]["decode"], 7 * hidden[:, 0])
    torch.testing.assert_close(found.ms["attention"]["prefill"], hidden * torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(found.ms["mlp"]["prefill"], hidden * torch.tensor([5.0, 37.0, 69.0, 101.0]))
    assert float(found.iqr_ms["mlp"]["decode"].max()) < 1e-9
    predicted = found.predict("decode", 64, [96, 32, 0], [2, 1, 0])
    assert predicted == pytest.approx(64 * (7 + 101 + 37 + 5 + 3 + 2 + 1))
    assert found.predict("decode", 56, [48] * 3, [2] * 3) == pytest.approx(56 * (7 + 3 * (53 + 3)))


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_table(tmp_path, table())
    found = read_table(tmp_path, TOPOLOGY)
    assert Candidates(found.hidden, found.intermediate, found.kv_heads) == WIDTHS
    assert found.made_on == table().made_on
    for block in BLOCKS:
        for phase in PHASES:
            assert torch.equal(found.ms[block][phase], table().ms[block][phase])
            assert torch.equal(found.iqr_ms[block][phase], table().iqr_ms[block][phase])


def test_a_table_that_does_not_serve_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "none", None)
    with pytest.raises(ArtifactError, match=r"timed nothing.*dvc repro profile_hardware"):
        read_table(tmp_path / "none", TOPOLOGY)
    write_table(tmp_path / "other", table())
    other = Topology(layers=4, hidden=64, intermediate=96, kv_heads=2, group_size=2, head_dim=16)
    with pytest.raises(ArtifactError, match=r"timed a model of .*'layers': 3.*'layers': 4"):
        read_table(tmp_path / "other", other)
    (tmp_path / "other" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="damaged profile"):
        read_table(tmp_path / "other", TOPOLOGY)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A model, masks and parameters that ask for measured widths."""
    save_tiny_model("mistral", tmp_path / "model")
    masks = project(TOPOLOGY, random_masks(TOPOLOGY, 1).score, 0.4)
    write_masks(tmp_path / "masks", masks, made_with={}, validation_ppl=1.0)
    yaml = YAML()
    params = yaml.load(Path("params.yaml"))
    params["sparsity"] = 0.4
    params["adapt_dimensions"]["multiple"] = "measured"
    params["profile_hardware"] |= {
        "hidden_step": 8, "intermediate_step": 8, "prefill_tokens": 8, "decode_prompt_tokens": 4, "decode_tokens": 2,
        "repeats": 3, "max_warmup": 2,
    }  # fmt: skip
    yaml.dump(params, tmp_path / "params.yaml")
    return tmp_path


def run(stage: object, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(stage.main)  # type: ignore[attr-defined]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def profiled(root: Path) -> None:
    run(
        profile_hardware, "--model", f"{root}/model", "--out", f"{root}/profile",
        "--learning", f"{root}/learning_profile", "--metrics", f"{root}/profile.json",
        "--staircase", f"{root}/profile.csv", "--params", f"{root}/params.yaml",
    )  # fmt: skip


def adapted(root: Path) -> str:
    return run(
        adapt_dimensions, "--model", f"{root}/model", "--masks", f"{root}/masks", "--profile", f"{root}/profile",
        "--adapted", f"{root}/adapted", "--metrics", f"{root}/adapt.json", "--params", f"{root}/params.yaml",
    )  # fmt: skip


def test_times_that_fall_with_the_width_are_noise() -> None:
    times = torch.tensor([[1.0, 3.0, 2.0], [0.5, 4.0, 5.0]], dtype=torch.float64)
    same = {name: {phase: value.clone() for phase in PHASES} for name, value in {"mlp": times}.items()}
    found = LatencyTable([48, 64], [0, 32, 96], [0, 2], same, {}, MADE_ON).rising()  # type: ignore[arg-type]
    expected = torch.tensor([[0.75, 2.5, 2.5], [0.75, 4.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(found.ms["mlp"]["decode"], expected)


def test_masks_learned_for_a_latency_stay_and_the_table_that_learning_takes_is_written_for_it_alone(
    pipeline: Path,
) -> None:
    profiled(pipeline)
    assert json.loads((pipeline / "learning_profile" / "meta.json").read_text())["enabled"] is False
    params, yaml = pipeline / "params.yaml", YAML()
    content = yaml.load(params)
    content["adapt_dimensions"]["multiple"] = 8
    content["learn_masks"] |= {"budget": "latency", "latency": {"phase": "decode", "ratio": 0.8}}
    yaml.dump(content, params)
    profiled(pipeline)
    learning, own = (read_table(pipeline / name, TOPOLOGY) for name in ("learning_profile", "profile"))
    assert torch.equal(learning.ms["mlp"]["decode"], own.ms["mlp"]["decode"])
    output = adapted(pipeline)
    assert "predicted of the dense latency on" in output
    before, after = (read_masks(pipeline / name, TOPOLOGY) for name in ("masks", "adapted"))
    assert all(torch.equal(before.keep[axis], after.keep[axis]) for axis in before.keep)
    report = json.loads((pipeline / "adapt.json").read_text())
    assert "target_sparsity" not in report
    assert report["decode"]["predicted_ms"] > 0


def test_the_stages_profile_and_adapt_to_what_was_measured(pipeline: Path) -> None:
    profiled(pipeline)
    assert len((pipeline / "profile.csv").read_text().splitlines()) == 1 + 13
    output = adapted(pipeline)
    assert "predicted of the dense latency on" in output
    assert "warning" not in output
    after = read_masks(pipeline / "adapted", TOPOLOGY)
    assert sparsity(TOPOLOGY, after.widths()) >= 0.4
    assert all(width % 8 == 0 for width in after.widths()["intermediate"].tolist())
    report = json.loads((pipeline / "adapt.json").read_text())
    assert report["decode"]["predicted_ms"] > 0
    assert report["profile_threads"] == torch.get_num_threads()


def test_nothing_is_timed_where_measured_is_not_asked_for(pipeline: Path) -> None:
    path, yaml = pipeline / "params.yaml", YAML()
    params = yaml.load(path)
    params["adapt_dimensions"]["multiple"] = 32
    yaml.dump(params, path)
    profiled(pipeline)
    assert json.loads((pipeline / "profile.json").read_text()) == {"enabled": 0}
    assert json.loads((pipeline / "profile" / "meta.json").read_text())["enabled"] is False


def test_the_alignment_table_has_a_row_for_each(pipeline: Path) -> None:
    profiled(pipeline)
    paths = [f"--{name}={pipeline / name}" for name in ("model", "masks", "profile")]
    output = run(alignment_table, *paths, f"--params={pipeline}/params.yaml", "--repeats=3", "--max-warmup=2")
    rows = [line.split("|")[1].strip() for line in output.splitlines() if line.startswith("|")]
    assert rows == ["multiple", "---", "dense", "1", "8", "16", "32", "64", "128", "measured"]


def test_the_speed_of_masks_is_a_table(pipeline: Path) -> None:
    sizes = ["--prefill-tokens", "8", "--decode-prompt-tokens", "4", "--decode-tokens", "2", "--repeats", "3"]
    output = run(
        mask_speed, "--model", f"{pipeline}/model", "--masks", f"{pipeline}/masks", "--multiple", "16",
        "--batch-sizes", "1,2", *sizes,
    )  # fmt: skip
    rows = [line for line in output.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert [row.split(" | ")[1] for row in rows] == ["prefill", "decode"] * 2
    assert all(float(row.split(" | ")[2]) > 0 for row in rows)
    assert 0.4 <= float(output.split(" of the decoder removed")[0].split()[-1]) < 0.45
