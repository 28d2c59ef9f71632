"""The certificate of an export: what it says holds, and what it does not vouch for is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.tiny_models import random_masks, save_tiny_model, tiny_tokenizer
from tvaprune.checkpoint.card import Base, read_provenance
from tvaprune.checkpoint.certificate import (
    Check,
    DamagedDirectoryError,
    Reference,
    against_reference,
    hashes,
    prompt_ids,
    read_certificate,
)
from tvaprune.checkpoint.compact import compact
from tvaprune.checkpoint.export import certify, require
from tvaprune.checkpoint.gguf import write_gguf
from tvaprune.checkpoint.loading import load_config
from tvaprune.checkpoint.parity import compact_logits, masked_dense_logits, same_choices
from tvaprune.checkpoint.report import sizes
from tvaprune.checkpoint.update import weight_update
from tvaprune.model.topology import Topology
from tvaprune.verify import main, verify
from tvaprune.widths.adapt import Layout, adapt
from tvaprune.widths.masks import project

BOUND = 1e-3
MADE_WITH = {"learn_masks": {"method": "tva", "sparsity": 0.4}}
SOURCE = {"source": "hub", "repo": "someone/tiny", "revision": "abc", "license": "Apache-2.0"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exported"))[0]


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A certified export, uneven, to do with as one likes."""
    return Path(shutil.copytree(exported, tmp_path / "given"))


def export(
    tmp_path: Path, layout: Layout = "uneven", family: str = "llama", gguf: str | None = None
) -> tuple[Path, list[Check]]:
    dense = save_tiny_model(family, tmp_path / "dense")
    tiny_tokenizer(dense)
    (dense / "tvaprune_source.json").write_text(json.dumps(SOURCE))
    topology = Topology.of(load_config(dense))
    masks = adapt(topology, project(topology, random_masks(topology, 3), 0.4), 0.4, "budget", 4, 8, layout=layout)
    update = weight_update(masks, "mean")
    out = tmp_path / "out"
    size = compact(dense, masks, update, out, layout)
    if gguf:
        write_gguf(out, out / "model.gguf", gguf)  # type: ignore[arg-type]
    input_ids = prompt_ids(AutoTokenizer.from_pretrained(dense), 24)
    reference = Reference("masked dense model", input_ids, masked_dense_logits(dense, masks, update, input_ids))
    first = against_reference("masked = compact", reference, compact_logits(out, input_ids), BOUND)
    return out, certify(out, reference, BOUND, Base.of(dense), MADE_WITH, sizes(topology, masks, size), [first])


@pytest.mark.parametrize("layout", ["uneven", "uniform", "padded"])
def test_an_export_is_certified_and_verifies_elsewhere(layout: Layout, tmp_path: Path) -> None:
    out, checks = export(tmp_path, layout, gguf="f32")
    assert [check.passed for check in checks] == [True] * 4
    require(out, checks)
    written = json.loads((out / "parity.json").read_text())
    for check in checks:
        figures = written["checks"][check.name]
        assert figures["passed"]
        assert 0 <= figures.get("max_abs_logit_diff", 0) < BOUND
    assert written["checks"]["llama.cpp from model.gguf"]["token_agreement"] == 1
    assert str(tmp_path) not in (out / "parity.json").read_text() + (out / "README.md").read_text()
    assert ("trust_remote_code=True" in (out / "README.md").read_text()) == (layout == "uneven")
    shutil.rmtree(tmp_path / "dense")
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    again = verify(moved)
    assert [check.name for check in again] == [check.name for check in checks[1:]]
    assert all(check.passed for check in again)


def test_the_bound_fails_a_model_that_is_another(out: Path) -> None:
    _, reference = read_certificate(out)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    logits = compact_logits(out, reference.input_ids)
    check = against_reference("masked = compact", reference, logits, BOUND)
    assert check.passed is False
    with pytest.raises(ValueError, match="masked = compact: FAILED"):
        require(out, [check])
    base, made_with, figures = read_provenance(out)
    again = certify(out, reference, BOUND, base, made_with, figures, [])
    assert [check.passed for check in again] == [False, True]  # it generates consistently, but something else
    assert [check.passed for check in verify(out)] == [False, True]


def _flip_a_weight(out: Path) -> str:
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "model.safetensors: changed"


def _edit_the_config(out: Path) -> str:
    path = out / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    return "config.json: changed"


def _add_code(out: Path) -> str:
    (out / "extra.py").write_text("raise SystemExit")
    return "extra.py: not in the certificate"


def _lose_the_tokenizer(out: Path) -> str:
    (out / "tokenizer.json").unlink()
    return "tokenizer.json: absent"


def _break_the_certificate(out: Path) -> str:
    (out / "parity.json").write_text("{")
    return "damaged certificate"


@pytest.mark.parametrize(
    "damage", [_flip_a_weight, _edit_the_config, _add_code, _lose_the_tokenizer, _break_the_certificate]
)
def test_damage_is_named(damage: Callable[[Path], str], out: Path) -> None:
    with pytest.raises(DamagedDirectoryError, match=damage(out)):
        verify(out)


def test_unknown_code_is_not_run(out: Path, tmp_path: Path) -> None:
    """A certificate is no signature: whoever changes the code can write its hash too."""
    modeling, ran = out / "modeling_tvaprune.py", tmp_path / "ran"
    modeling.write_text(modeling.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    certificate = json.loads((out / "parity.json").read_text())
    certificate["files"] = hashes(out)
    (out / "parity.json").write_text(json.dumps(certificate))
    with pytest.raises(ValueError, match=r"modeling_tvaprune\.py: code that is not"):
        verify(out)
    assert not ran.exists()
    assert all(check.passed for check in verify(out, trust_remote_code=True))
    assert ran.exists()


def test_the_command_line(out: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, [str(out)])
    assert shown.exit_code == 0
    assert "reloaded in a fresh process: passed" in shown.output
    _flip_a_weight(out)
    assert CliRunner().invoke(app, [str(out)]).exit_code == 1
    missing = CliRunner().invoke(app, [str(tmp_path)])
    assert missing.exit_code == 1
    assert "not a directory that tvaprune exported" in missing.output


def test_the_card_says_where_it_comes_from_and_how_to_load_it(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.license == "apache-2.0"
    assert "trust_remote_code=True" in card.text
    assert "| layer | key-value heads | intermediate |" in card.text
    assert '"method": "tva"' in card.text
    base, made_with, figures = read_provenance(out)
    assert made_with == MADE_WITH
    assert base.source["revision"] == "abc"
    assert base.sha256.keys() == {"model.safetensors"}
    assert figures["params_kept"] == sum(t.numel() for t in load_file(out / "model.safetensors").values())


def test_a_base_without_a_record_has_a_card_too(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path)
    assert Base.of(dense).source == {}
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    assert Base.of(dense).license == "mit"


def test_a_tie_may_part_generations_and_nothing_else_may() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.5, 0.5 - 1e-5], [3.0, 0.0]]])
    ours = torch.tensor([[0, 0, 0]])
    assert same_choices(logits, ours, torch.tensor([[0, 1, 1]]), tie=1e-4) == 1
    assert same_choices(logits, ours, torch.tensor([[0, 1, 1]]), tie=1e-6) == 0
    assert same_choices(logits, ours, torch.tensor([[1, 0, 0]]), tie=1e-4) == 0
