"""The quantize stage: what is measured is what the runtimes compute; damaged files and unfit widths are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoConfig, AutoModelForCausalLM

from stages.quantize import main
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.unit.test_gguf import masks_of, pruned, saved
from tvaprune.architecture.topology import Topology, hidden_states
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.loading import load
from tvaprune.export.gguf import write_gguf
from tvaprune.export.quantized import write_files
from tvaprune.export.torchao import write_int8
from tvaprune.export.widths import check_group_heads, check_group_multiples, check_widths
from tvaprune.masks.adapt import adapt
from tvaprune.measures.perplexity import nll_by_window
from tvaprune.measures.quantized import STORED, mean_kl, measure_files, output_matrix
from tvaprune.options.quantize import GROUPS
from tvaprune.params.loading import ParameterError
from tvaprune.params.quantize import QuantizeParams
from tvaprune.proof.certificate import DamagedDirectoryError
from tvaprune.proof.gguf_runtime import final_states
from tvaprune.proof.quantized import QUANTIZED, check_quantized, kl_check
from tvaprune.verify import verify

WINDOWS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
def test_llama_cpp_gives_the_states_that_transformers_computes(family: str, tmp_path: Path) -> None:
    directory = pruned(family, tmp_path, masks_of(family, empty_layer=1))
    write_gguf(directory, tmp_path / "model.gguf", "f32")
    model = load(directory, torch.float32)
    with torch.inference_mode():
        for window, states in zip(WINDOWS, final_states(tmp_path / "model.gguf", WINDOWS), strict=True):
            torch.testing.assert_close(states, hidden_states(model, window[None])[0], rtol=0, atol=0.05)
    assert torch.equal(output_matrix(tmp_path / "model.gguf"), model.get_output_embeddings().weight)


def test_coarser_types_are_smaller_and_further_from_the_model(tmp_path: Path) -> None:
    directory, files = saved("llama_tied", tmp_path / "model"), {}
    for kind in ("bf16", "q8_0", "q5_1", "q4_0"):
        files[kind] = tmp_path / f"{kind}.gguf"
        write_gguf(directory, files[kind], kind)
    windows = {"validation": {"notes": WINDOWS[:2]}, "test": {"notes": WINDOWS[2:]}}
    found = measure_files(directory, files, windows)
    assert list(found) == [STORED, *files]
    distances = [found[kind].mean_kl for kind in files]
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1]
    sizes = [found[kind].size for kind in files]
    assert sizes == sorted(sizes, reverse=True)
    nll = nll_by_window(load(directory, torch.float32), WINDOWS[:2], 1)
    assert found[STORED].perplexity["validation"]["notes"].nll_per_token == pytest.approx(float(nll.mean()), rel=1e-5)


def test_mean_kl_is_that_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    head, other = torch.randn(11, 8, generator=generator), torch.randn(11, 8, generator=generator)
    first, second = (ours @ head.T).softmax(-1), (theirs @ other.T).softmax(-1)
    expected = sum(float(p * (p / q).log()) for p, q in zip(first.flatten(), second.flatten(), strict=True)) / 5
    assert mean_kl(ours, head, theirs, other) == pytest.approx(expected, rel=1e-4)
    assert mean_kl(ours, head, ours, head) == 0


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after the stage: dense and compact, two types."""
    root = tmp_path_factory.mktemp("quantized")
    save_tiny_model("llama_tied", root / "dense")
    tiny_tokenizer(root / "dense")
    masks = adapt(Topology.of(tiny_model("llama_tied").config), masks_of("llama_tied"), 0.2, "nearest", 32, 32)
    compacted = pruned("llama_tied", root, masks)
    (root / "heldout").mkdir()
    text = "the old mill stands by the river and turns no more " * 30
    (root / "heldout" / "notes.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": f"{n} {text}"}) + "\n" for n in range(8))
    )
    section = {
        "enabled": True, "types": ["q8_0", "q4_0", "int8_wo"], "window": 16,
        "validation": {"notes": 2}, "test": {"notes": 2},
        "prefill_tokens": 8, "decode_tokens": 4, "repeats": 3,
    }  # fmt: skip
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"quantize": section}, file)
    main(
        root / "dense", compacted, root / "none", root / "heldout", root / "out", root / "m.json", root / "params.yaml"
    )
    return root


def test_the_stage_measures_every_model_and_type(quantized: Path) -> None:
    found = json.loads((quantized / "m.json").read_text())
    for model in ("dense", "compact"):
        assert set(found[model]) == {"stored", "q8_0", "q4_0", "int8_wo"}
        for kind, file in (("q8_0", "q8_0.gguf"), ("q4_0", "q4_0.gguf"), ("int8_wo", "int8_wo/model.safetensors")):
            one = found[model][kind]
            assert one["bytes"] == (quantized / f"out/{model}-{file}").stat().st_size
            assert one["decode"]["tokens_per_s"] == pytest.approx(1000 / one["decode"]["latency_ms"])
            assert one["prefill"]["tokens_per_s"] == pytest.approx(8000 / one["prefill"]["latency_ms"])
            assert one["mean_kl"] > 0
        assert found[model]["stored"]["decode"]["tokens_per_s"] > 0
    assert found["dense"]["stored"]["validation_ratio"] == 1


def test_verify_passes_and_catches_one_changed_byte(quantized: Path, tmp_path: Path) -> None:
    checks = verify(quantized / "out")
    assert len(checks) == 8
    assert all(check.passed for check in checks)
    assert [check.name for check in checks[6:]] == [
        f"{model}-int8_wo = reloaded in a fresh process" for model in ("dense", "compact")
    ]
    for name in ("compact-q4_0.gguf", "compact-int8_wo/model.safetensors"):
        file = quantized / "out" / name
        content = file.read_bytes()
        try:
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(DamagedDirectoryError, match=f"{re.escape(name)}: changed"):
                verify(quantized / "out")
        finally:
            file.write_bytes(content)
    with pytest.raises(ValueError, match="quantised files are not run in vLLM; leave out --vllm"):
        verify(quantized / "out", vllm=Path("python"))
    certificate = json.loads((quantized / "out" / QUANTIZED).read_text())
    certificate["measured"]["compact-q4_0.gguf"]["mean_kl"] = 7.0
    certificate["measured"]["dense-int8_wo"]["reloaded"]["max_rel_logit_diff"] = 0.5
    (tmp_path / QUANTIZED).write_text(json.dumps(certificate | {"files": {}}))
    failed = [check.name for check in check_quantized(tmp_path) if check.passed is False]
    assert failed == ["compact-q4_0.gguf = unquantised", "dense-int8_wo = reloaded in a fresh process"]


def test_int8_weights_load_with_transformers_and_are_written_the_same_twice(quantized: Path, tmp_path: Path) -> None:
    """Three writes more, because the metadata of safetensors gets a random order, which can be the same by chance."""
    directory = quantized / "out" / "compact-int8_wo"
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    kinds = {type(module.weight).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {"Int8Tensor", "Parameter"}  # the last matrix stays
    ids = WINDOWS[:1]
    with torch.inference_mode():
        expected, found = load(quantized / "compact")(ids).logits, model(ids).logits
    assert 0 < (expected - found).norm() < 0.1 * expected.norm()
    for number in range(3):
        write_int8(quantized / "compact", tmp_path / str(number), ids)
        again = {file.name: file.read_bytes() for file in (tmp_path / str(number)).iterdir()}
        assert again == {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def test_a_width_that_a_type_cannot_hold_is_named_before_any_file_is_written(tmp_path: Path) -> None:
    masks = masks_of("llama")
    masks.keep["intermediate"][1] = torch.arange(96) < 40
    masks.keep["intermediate"][[0, 2]] = torch.arange(96) < 64
    masks.keep["hidden"][:] = True
    directory = pruned("llama", tmp_path, masks)
    with pytest.raises(ValueError, match=r"layer 1: the MLP width is 40, and q8_0 .* of 32; .*intermediate to 32"):
        write_files({"compact": directory}, ["int8_wo", "q8_0"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_widths("compact", load_config(directory), ["bf16", "int8_wo"])
    dense = AutoConfig.for_model("llama", hidden_size=72, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=r"dense: the hidden width is 72, .* of 32; leave q4_0 out"):
        check_widths("dense", dense, ["q4_0"])


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_a_multiple_that_does_not_fit_a_group_is_told_what_to_be(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "q8_0", group)
    check_group_multiples(["q8_0", "int8_wo"], {"intermediate": group, "hidden": 2 * group})
    with pytest.raises(ValueError, match=rf"multiple\.hidden = 24: q8_0 .* of {group}; raise it to {3 * group}"):
        check_group_multiples(["q8_0"], {"intermediate": group, "hidden": 24})


def test_heads_that_may_not_hold_a_group_are_refused_before_any_is_pruned() -> None:
    check_group_heads(["bf16", "q8_0", "int8_wo"], 192)
    check_group_heads(["bf16", "int8_wo"], 48)
    with pytest.raises(ValueError, match=r"q8_0 needs .* of 32, and a key-value head of this model has 48 rows"):
        check_group_heads(["bf16", "q8_0"], 48)


def test_int4_of_torchao_is_refused_with_what_to_use(tmp_path: Path) -> None:
    content = YAML(typ="safe").load(Path("params.yaml"))
    content["quantize"]["types"] = ["int4_wo"]
    with pytest.raises(ParameterError, match=r"int4_wo is not offered: .*use int8_wo"):
        QuantizeParams.of(content, tmp_path / "params.yaml")


def test_a_kl_just_above_its_bound_is_not_said_to_be_the_bound() -> None:
    check = kl_check("a", "q4_1", 1.04)
    assert not check.passed
    assert check.figures["mean_kl"] > check.bounds["mean_kl"] == 1.0
