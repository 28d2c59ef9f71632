"""The quantize stage: what is measured is what llama.cpp computes, and a damaged file is refused."""

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from stages.quantize import main
from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tests.unit.test_gguf import masks_of, pruned, saved
from tvaprune.architecture.topology import hidden_states
from tvaprune.checkpoint.loading import load
from tvaprune.export.gguf import write_gguf
from tvaprune.measures.perplexity import nll_by_window
from tvaprune.measures.quantized import STORED, mean_kl, measure_files, output_matrix
from tvaprune.proof.certificate import DamagedDirectoryError
from tvaprune.proof.gguf_runtime import final_states
from tvaprune.proof.quantized import QUANTIZED, check_quantized
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
    compacted = pruned("llama_tied", root, masks_of("llama_tied"))
    (root / "heldout").mkdir()
    text = "the old mill stands by the river and turns no more " * 30
    (root / "heldout" / "notes.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": f"{n} {text}"}) + "\n" for n in range(8))
    )
    section = {
        "enabled": True, "types": ["q8_0", "q4_0"], "window": 16, "validation": {"notes": 2}, "test": {"notes": 2},
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
        assert set(found[model]) == {"stored", "q8_0", "q4_0"}
        for kind in ("q8_0", "q4_0"):
            one = found[model][kind]
            assert one["bytes"] == (quantized / f"out/{model}-{kind}.gguf").stat().st_size
            assert one["decode"]["tokens_per_s"] == pytest.approx(1000 / one["decode"]["latency_ms"])
            assert one["prefill"]["tokens_per_s"] == pytest.approx(8000 / one["prefill"]["latency_ms"])
            assert one["mean_kl"] > 0
    assert found["dense"]["stored"]["validation_ratio"] == 1


def test_verify_passes_and_catches_one_changed_byte(quantized: Path, tmp_path: Path) -> None:
    checks = verify(quantized / "out")
    assert len(checks) == 4
    assert all(check.passed for check in checks)
    file = quantized / "out" / "compact-q4_0.gguf"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedDirectoryError, match=r"compact-q4_0\.gguf: changed"):
            verify(quantized / "out")
    finally:
        file.write_bytes(content)
    certificate = json.loads((quantized / "out" / QUANTIZED).read_text())
    certificate["measured"]["compact-q4_0.gguf"]["mean_kl"] = 7.0
    (tmp_path / QUANTIZED).write_text(json.dumps(certificate | {"files": {}}))
    assert [check.passed for check in check_quantized(tmp_path)].count(False) == 1
