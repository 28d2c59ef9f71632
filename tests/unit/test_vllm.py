"""The pruned directory in vLLM: what its transformers backend asks of the modeling file, and vLLM itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

from tests.http_servers import post, serving
from tests.tiny_models import random_masks, random_update, tiny_model, tiny_tokenizer
from tests.vllm_environment import vllm_python
from tools.vllm_speed import agreement, row, table
from tvaprune import commands
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.loading import load
from tvaprune.masks.adapt import adapt
from tvaprune.masks.projection import project
from tvaprune.options.choices import Layout
from tvaprune.proof.certificate import (
    DamagedDirectoryError,
    Reference,
    prompt_ids,
    read_certificate,
    write_certificate,
)
from tvaprune.proof.checks import against_reference, generation, reload_fresh, run_fresh
from tvaprune.proof.parity import compact_logits
from tvaprune.proof.vllm_runtime import EAGER, ENVIRONMENT, IN_A_WORKER, compare_top

BOUND = 1e-4
FAMILIES = ["llama", "llama_tied", "llama_bias", "mistral", "qwen2", "qwen3"]
PROMPT = torch.randint(0, 128, (1, 11), generator=torch.Generator().manual_seed(1))


def pruned(folder: Path, family: str, layout: Layout = "uneven", empty: int | None = None) -> Path:
    """A certified directory; head_dim is one that vLLM's attention on a CPU takes."""
    dense = folder / "dense"
    tiny_model(family, head_dim=32).save_pretrained(dense)
    tiny_tokenizer(dense)
    topology, out = Topology.of(load_config(dense)), folder / "out"
    masks = random_masks(topology, seed=5, empty_layer=empty)
    if layout == "uniform":
        masks = adapt(topology, project(topology, masks.score, 0.4), 0.4, "budget", 4, 8, layout=layout)
    if layout == "padded":  # a stock Llama's width is a multiple of its heads
        masks.keep["hidden"][:] = True
    compact(dense, masks, random_update(topology, seed=6), out, layout)
    input_ids = prompt_ids(AutoTokenizer.from_pretrained(dense), 24)
    reference = Reference("the compact model", input_ids, compact_logits(out, input_ids))
    write_certificate(out, reference, [], BOUND, trust_remote_code=layout == "uneven")
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a server's attention function, registered as vLLM's, was called with."""
    found: list[dict[str, Any]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **given: Any) -> tuple[Any, None]:
        found.append({"layer": module.layer_idx, "heads": query.shape[1], "kv_heads": key.shape[1], **given})
        scale = given.get("scaling")
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attend)
    return found


@pytest.mark.parametrize("empty", [None, 0, 1], ids=["all blocks", "layer 0 gone", "layer 1 gone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_builds_the_base_model(
    family: str, empty: int | None, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    """It sets its attention in the config, builds AutoModel, and hands its own arguments to every layer's attention."""
    model = load(pruned(tmp_path, family, empty=empty))
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert type(base).__name__ == "TvaPruneModel"
    assert type(base).is_backend_compatible()
    positions = torch.arange(PROMPT.shape[1])[None]
    with torch.inference_mode():
        expected = model.model(PROMPT).last_hidden_state
        base.config._attn_implementation = "vllm"
        found = base(PROMPT, position_ids=positions, use_cache=False, return_dict=False, from_the_server=7)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sizes = [(own.num_attention_heads, own.num_key_value_heads) for own in base.config.per_layer_config]
    assert [call["layer"] for call in calls] == [0, 1, 2]
    assert [(call["heads"], call["kv_heads"]) for call in calls] == sizes
    assert all(call["from_the_server"] == 7 for call in calls)


def test_the_class_is_named_in_the_config(tmp_path: Path) -> None:
    out = pruned(tmp_path, "llama")
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_tvaprune.TvaPruneModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_tvaprune.TvaPruneForCausalLM"


@pytest.mark.parametrize("family", ["llama_bias", "qwen3"])
def test_attention_implementations_compute_the_same(family: str, tmp_path: Path) -> None:
    model: PreTrainedModel = load(pruned(tmp_path, family))
    with torch.inference_mode():
        model.set_attn_implementation("sdpa")
        expected = model(PROMPT, output_hidden_states=True)
        model.set_attn_implementation("eager")
        found = model(PROMPT, output_hidden_states=True, output_attentions=True)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert len(expected.hidden_states) == len(found.hidden_states) == 4
    assert [weights.shape[-1] for weights in found.attentions] == [PROMPT.shape[1]] * 3


def test_close_generations() -> None:
    """Different tokens pass where each is among the other's likeliest; what follows them is not compared."""
    logits = torch.zeros(1, 3, 8)
    logits[0, :, 2], logits[0, :, 3] = 4.0, 3.9
    own, chosen = logits.log_softmax(-1), torch.tensor([[2, 2, 2]])
    reported = [[{token: float(own[0, step, token]) for token in (2, 3)} for step in range(3)]]
    assert compare_top(logits, chosen, chosen, reported) == (1, pytest.approx(0, abs=1e-6))
    assert compare_top(logits, chosen, torch.tensor([[2, 3, 7]]), reported)[0] == 1
    reported[0][0][2] += 0.5
    assert compare_top(logits, chosen, chosen, reported)[1] == pytest.approx(0.5)
    logits[0, 1, 2:] = torch.tensor([9.0, 1, 8, 7, 6, 5])
    assert compare_top(logits, chosen, torch.tensor([[2, 3, 7]]), reported)[0] == 0


def test_the_cause_is_the_error_of_a_worker(tmp_path: Path) -> None:
    """vLLM's own last line says that its engine did not start, and no more."""
    said = """(Worker pid=7) ERROR 11-28 08:05:52 [executor.py:953]     raise ValueError(
(Worker pid=7) ERROR 11-28 08:05:52 [executor.py:953] ValueError: Unrecognized configuration class
(EngineCore pid=5) ERROR 11-28 08:05:58 [core.py:1510] Exception: WorkerProc initialization failed
RuntimeError: Engine core initialization failed. See root cause above."""
    with pytest.raises(DamagedDirectoryError, match=r"fresh process: ValueError: Unrecognized configuration class$"):
        run_fresh(["sh", "-c", "cat >&2; exit 1"], tmp_path, "vLLM", tmp_path, said, cause=IN_A_WORKER)


def test_a_process_that_is_killed_is_not_blamed_on_its_last_message(tmp_path: Path) -> None:
    killed = "echo 'Triton is installed, but has no CPU backend' >&2; kill -9 $$"
    with pytest.raises(DamagedDirectoryError, match=r"process: it was ended by signal 9, as where memory runs out$"):
        run_fresh(["sh", "-c", killed], tmp_path, "vLLM", tmp_path, cause=IN_A_WORKER)


def test_a_row_of_speeds() -> None:
    times = [{"first_s": 0.1, "whole_s": 1.0}, {"first_s": 0.3, "whole_s": 2.0}, {"first_s": 0.2, "whole_s": 4.0}]
    assert row({"dense": times}, requests=8, new_tokens=10) == ["8", "40.0 (20.0-80.0), 200 ms"]
    measured = {"vllm": "1.2", "processors": 2, "busy_with_others": 3.14, "dtype": "bfloat16", "weights_ratio": 0.8421}
    measured |= {"prompt_tokens": 128, "new_tokens": 10, "times": {"8": {"dense": times, "pruned": times[:1] * 3}}}
    printed = table(measured)
    assert "| requests | dense | pruned |" in printed
    assert "| 8 | 40.0 (20.0-80.0), 200 ms | 80.0 (80.0-80.0), 100 ms |" in printed
    assert all(
        said in printed for said in ("median of 3 rounds", "vLLM 1.2 on 2 CPU cores", "0.84", "was 3.1 processes")
    )


def test_a_row_of_agreement() -> None:
    found = {"tokens": 32.0, "max_abs_logprob_diff": 5.8e-05, "token_agreement": 2 / 3, "top5_agreement": 1.0}
    assert agreement([found, found]).splitlines()[-1] == "| 0.5 | 32 | 6e-05 nats | 67% | 100% |"


# One is in CI: a layer without a block, with which all that vLLM asks of a modeling file is used.
IN_CI = ("llama", "uneven", 0)
CASES = [
    *((family, "uneven", empty) for family in FAMILIES for empty in (None, 0, 1)),
    ("llama", "uniform", None),
    ("llama", "padded", 1),
]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("family", "layout", "empty"),
    [pytest.param(*case, marks=pytest.mark.slow if case == IN_CI else pytest.mark.nightly) for case in CASES],
)
def test_vllm_generates_the_same(family: str, layout: Layout, empty: int | None, tmp_path: Path) -> None:
    out, figures = pruned(tmp_path, family, layout, empty), tmp_path / "figures.json"
    arguments = ["verify", str(out), "--vllm", str(vllm_python()), "--serving", str(figures)]
    done = CliRunner().invoke(commands.app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(figures.read_text())["vllm"]["top5_agreement"] == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_server_completes_over_http(tmp_path: Path) -> None:
    """vLLM's OpenAI server of docs/serving.md."""
    out, prompt = pruned(tmp_path, "llama", empty=0), PROMPT[0].tolist()
    command = [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(out)]
    command += ["--model-impl", "transformers", "--trust-remote-code", "--enforce-eager", "--max-model-len", "64"]
    asked = {"model": str(out), "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with serving([*command, "--dtype", "float32"], tmp_path, **ENVIRONMENT, **EAGER, HF_HOME=str(tmp_path)) as address:
        (choice,) = post(f"{address}/v1/completions", **asked, return_token_ids=True)["choices"]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = load(out, dtype=torch.float32).generate(PROMPT, **settings)
    assert choice["token_ids"] == expected[0, len(prompt) :].tolist()
    assert choice["text"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_another_transformers_computes_the_same(tmp_path: Path) -> None:
    """The oldest that the modeling file is for: vLLM's environment has one below 5.20."""
    out = pruned(tmp_path, "llama_tied", empty=1)
    stored = read_certificate(out)
    beginnings, tokens = generation(out, stored.reference.input_ids)
    prompts = stored.reference.input_ids
    found = reload_fresh(out, prompts, beginnings, tokens, True, str(vllm_python()))
    check = against_reference("reloaded elsewhere", stored.reference, found["logits"], BOUND)
    assert check.passed, check
