"""What others do with the pruned directory: caches, compilers, quantisers, adapters, evaluators, the hub."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from tests.http_servers import post, serving
from tests.tiny_models import random_masks, random_update, save_tiny_model, tiny_model, tiny_tokenizer
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.loading import load

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[None, 0, 1], ids=["all blocks", "layer 0 gone", "layer 1 gone"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact Llama with tied embeddings and uneven layers, with tokenizer."""
    return pruned("llama_tied", request.param, tmp_path_factory.mktemp("interop"))


def pruned(family: str, empty_layer: int | None, parent: Path) -> Path:
    dense = save_tiny_model(family, parent / "dense")
    tiny_tokenizer(dense)
    topology = Topology.of(load_config(dense))
    compact(
        dense, random_masks(topology, seed=5, empty_layer=empty_layer), random_update(topology, seed=6), parent / "out"
    )
    return parent / "out"


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return load(directory)


def generated(model: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(PROMPTS, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


def test_every_layer_says_its_widths(model: PreTrainedModel) -> None:
    for index, (layer, own) in enumerate(zip(model.model.layers, model.config.per_layer_config, strict=True)):
        if heads := model.config.kv_head_counts[index]:
            assert layer.self_attn.k_proj.out_features == own.num_key_value_heads * own.head_dim
            assert layer.self_attn.q_proj.out_features == own.num_attention_heads * own.head_dim
            assert own.num_key_value_heads == heads
        if own.intermediate_size:
            assert layer.mlp.up_proj.out_features == own.intermediate_size


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_stock_classes_give_every_layer_the_same_size(family: str) -> None:
    """Why a checkpoint brings a modeling file: only caches read `per_layer_config` (transformers#45332).

    Where this fails, transformers builds layers of the sizes in a stock config, and the file can go.
    """
    config = tiny_model(family).config
    width, layers = config.intermediate_size, config.num_hidden_layers
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {layer: {"intermediate_size": width - 4 * (1 + layer)} for layer in range(layers)}
    built = AutoModelForCausalLM.from_config(config).model.layers
    assert [layer.mlp.up_proj.out_features for layer in built] == [width] * layers


def test_a_static_cache_generates_the_same(model: PreTrainedModel) -> None:
    dynamic = generated(model)
    assert torch.equal(generated(model, cache_implementation="static", disable_compile=True), dynamic)
    assert torch.equal(generated(model, use_cache=False), dynamic)


@pytest.mark.parametrize("empty_layer", [None, 0, 1])
def test_assisted_decoding_crops_the_caches_of_a_sliding_window(empty_layer: int | None, tmp_path: Path) -> None:
    directory = pruned("mistral", empty_layer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory, sliding_window=6)
    prompt = PROMPTS[:1]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **settings)
    assert not torch.equal(load(directory).generate(prompt, **settings), expected)
    for options in ({}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(prompt, **options, **settings), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_generates_the_same(implementation: str, model: PreTrainedModel) -> None:
    """Its pages are as wide as the dense model's heads in every layer; here a batch holds less than all prompts."""
    model.set_attn_implementation(implementation)
    expected = {tuple(row[:11].tolist()): row[11:].tolist() for row in generated(model, eos_token_id=None)}
    answers = model.generate_batch(
        PROMPTS.tolist(),
        GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(page_size=8, num_blocks=16, max_batch_tokens=16),
        progress_bar=False,
    )
    assert {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()} == expected


def test_a_compiled_model_computes_the_same(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        expected = model(PROMPTS, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(PROMPTS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_saving_again_and_loading_without_this_package(model: PreTrainedModel, tmp_path: Path) -> None:
    """What save_pretrained writes is complete: a process that knows transformers alone loads it and saves it again."""
    model.save_pretrained(tmp_path / "first")
    script = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("first", trust_remote_code=True)
assert "tvaprune" not in sys.modules
model.save_pretrained("second")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, env=environment, check=True)
    for name in ("first", "second"):
        again = load(tmp_path / name)
        assert (tmp_path / name / "modeling_tvaprune.py").is_file()
        with torch.inference_mode():
            assert torch.equal(again(PROMPTS).logits, model(PROMPTS).logits)


def test_an_override_of_the_config_counts_and_is_saved(directory: Path, tmp_path: Path) -> None:
    """As in a stock model: an argument of from_pretrained, an edit of config.json, and both written again."""
    dense = load(directory)
    changed = {
        "rms_norm_eps": 1e-3,
        "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "max_position_embeddings": 2048,  # the default of the class, which save_pretrained leaves out of stock configs
    }
    assert all(getattr(dense.config, key) != value for key, value in changed.items())
    model = AutoModelForCausalLM.from_pretrained(directory, **changed)
    model.save_pretrained(tmp_path / "saved")
    edited = tmp_path / "edited"
    shutil.copytree(directory, edited)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, **changed}))
    with torch.inference_mode():
        expected = model(PROMPTS)
        assert expected.past_key_values is None
        assert not torch.allclose(expected.logits, dense(PROMPTS).logits)
        for other in (load(tmp_path / "saved"), load(edited)):
            assert all(getattr(other.config, key) == value for key, value in changed.items())
            assert other.model.layers[2].input_layernorm.variance_epsilon == other.model.norm.variance_epsilon == 1e-3
            assert torch.equal(other(PROMPTS).logits, expected.logits)


def test_a_vocabulary_of_another_size_is_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    model.resize_token_embeddings(136)
    model.save_pretrained(tmp_path / "resized")
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "resized")(PROMPTS).logits, model(PROMPTS).logits)


def test_outputs_are_those_of_a_stock_model(model: PreTrainedModel) -> None:
    """A tuple on request, and attentions of every layer, with no head where a layer has none."""
    heads = model.config.kv_head_counts
    with torch.inference_mode():
        outputs = model(PROMPTS)
        as_tuple = model(PROMPTS, return_dict=False, labels=PROMPTS)
        assert len(as_tuple) == 3
        assert torch.equal(as_tuple[1], outputs.logits)
        model.set_attn_implementation("eager")
        attentions = model(PROMPTS, output_attentions=True).attentions
    length = PROMPTS.shape[1]
    group_size = model.config.num_attention_heads // model.config.num_key_value_heads
    expected = [(len(PROMPTS), count * group_size, length, length) for count in heads]
    assert [tuple(weights.shape) for weights in attentions] == expected


def test_logits_of_some_positions_are_those_of_a_stock_model(model: PreTrainedModel) -> None:
    """The last ones, the same or other ones of each sequence, and where a mask is true, which joins the sequences."""
    stock = tiny_model("llama")
    mask = torch.rand(PROMPTS.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    with torch.inference_mode():
        for positions in (0, 3, torch.tensor([4, 2]), torch.tensor([[4, 2, 0], [1, 1, 9]]), mask):
            part = model(PROMPTS, logits_to_keep=positions).logits
            assert part.shape == stock(PROMPTS, logits_to_keep=positions).logits.shape
            every = model(PROMPTS).logits
            if isinstance(positions, int):
                expected = every[:, -positions:]
            elif positions is mask:
                expected = every[mask]
            else:
                expected = torch.stack([row[index] for row, index in zip(every, positions.expand(2, -1), strict=True)])
            torch.testing.assert_close(part, expected)


def test_blocks_that_are_gone_but_for_their_bias_come_back_from_disk(tmp_path: Path) -> None:
    directory = pruned("llama_bias", 1, tmp_path)
    model = load(directory)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" for index in range(model.config.num_hidden_layers)}
    offloaded = AutoModelForCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path / "off")
    with torch.inference_mode():
        assert torch.equal(offloaded(PROMPTS).logits, model(PROMPTS).logits)


def test_int8_weights_of_torchao_generate(directory: Path, model: PreTrainedModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    quantised = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    kinds = {
        type(layer.mlp.up_proj.weight).__name__ for layer in quantised.model.layers if hasattr(layer.mlp, "up_proj")
    }
    assert "Parameter" not in kinds
    assert generated(quantised).shape == (2, 19)
    with torch.inference_mode():
        expected, found = model(PROMPTS).logits, quantised(PROMPTS).logits
    assert 0 < (expected - found).abs().max() < 0.1 * expected.abs().max()


def test_an_adapter_trains_and_merges(model: PreTrainedModel) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = adapted(PROMPTS, labels=PROMPTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        expected = adapted(PROMPTS).logits
        merged = adapted.merge_and_unload(safe_merge=True)
        assert (merged(PROMPTS).logits - expected).abs().max() < 1e-3


def test_lm_eval_loads_the_path(directory: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=str(directory), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
    request = Instance("loglikelihood", {}, ("The bank's", " engineers"), 0)
    ((found, _),) = evaluated.loglikelihood([request], disable_tqdm=True)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), load(directory, dtype=torch.float32)
    context, whole = tokenizer("The bank's")["input_ids"], tokenizer("The bank's engineers")["input_ids"]
    with torch.inference_mode():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole)))
    assert found == pytest.approx(expected, abs=1e-3)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload asks for; what it is given is kept in `received`, SHA-256 by name.

    It takes large files in the commit itself; the hub would send them to its own storage (Xet).
    """

    received: dict[str, str] = {}  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{self.server.server_address[1]}/me/pruned"
        answer: dict[str, Any] = {"url": here, "name": "me/pruned"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.received[line["value"]["path"]] = hashlib.sha256(content).hexdigest()
            answer = {"commitUrl": f"{here}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None}
        elif self.path == "/api/validate-yaml":
            answer = {"warnings": [], "errors": []}
        encoded = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_directory_uploads_to_a_hub(directory: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.received.clear()
    api = HfApi(endpoint=hub, token="hf_" + "a" * 34)
    api.create_repo("me/pruned", exist_ok=True)
    api.upload_folder(repo_id="me/pruned", folder_path=directory)
    sent = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "modeling_tvaprune.py", "tokenizer.json"} <= sent.keys()
    assert Hub.received == sent


@pytest.mark.parametrize(
    "options",
    [(), ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")],
    ids=["alone", "continuous batching"],
)
def test_the_server_of_transformers_completes_a_prompt(options: tuple[str, ...], tmp_path: Path) -> None:
    """Started as docs/serving.md says."""
    directory = pruned("llama_tied", 0, tmp_path)
    (program,) = re.findall(
        r"```python\n(# serve\.py\n.*?)```", (REPOSITORY / "docs/serving.md").read_text(), re.DOTALL
    )
    (tmp_path / "serve.py").write_text(program)
    command = [sys.executable, "serve.py", "serve", str(directory), "--device", "cpu", *options]
    request = {"model": str(directory), "prompt": "The bank", "max_tokens": 8, "temperature": 0}
    with serving(command, tmp_path, PYTHONPATH=str(REPOSITORY), HF_HUB_OFFLINE="1") as address:
        answer = post(f"{address}/v1/completions", **request)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), load(directory)
    prompt = tokenizer("The bank", return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(new, skip_special_tokens=True) != ""
