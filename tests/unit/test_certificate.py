"""The certificate of an export: what it says holds, and what it does not vouch for is refused."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.faults.warm import Warm
from tests.tiny_models import random_masks, random_update, save_tiny_model, tiny_tokenizer
from tvaprune.architecture.topology import Topology
from tvaprune.checkpoint.config import load_config
from tvaprune.checkpoint.cut import compact
from tvaprune.checkpoint.report import sizes
from tvaprune.checkpoint.tensor_files import Checkpoint
from tvaprune.commands import app
from tvaprune.export.card import Base, Provenance
from tvaprune.export.gguf import write_gguf
from tvaprune.export.seal import certify, require
from tvaprune.masks.adapt import adapt
from tvaprune.masks.projection import project
from tvaprune.options.choices import Layout
from tvaprune.options.masks import METHOD_OPTIONS
from tvaprune.params.compact import CompactParams
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.proof import checks
from tvaprune.proof.certificate import (
    Check,
    DamagedDirectoryError,
    Reference,
    hashes,
    prompt_ids,
    read_certificate,
)
from tvaprune.proof.checks import against_reference, bounded_check, fresh_checks, run_fresh
from tvaprune.proof.parity import compact_logits, masked_dense_logits, same_choices
from tvaprune.verify import verify

BOUND = 1e-4
REPOSITORY = Path(__file__).parents[2]
PARAMS = REPOSITORY / "params.yaml"
MADE_WITH = {"learn_masks": {"method": "tva", "sparsity": 0.4}}
SOURCE = {"source": "hub", "repo": "someone/tiny", "revision": "abc", "license": "Apache-2.0"}


@pytest.fixture(scope="module", autouse=True)
def warm_reloads(warm: Warm) -> Iterator[None]:
    """Models are reloaded in processes that are forked, but for one test."""

    def run(command: list[str], *args: Any, **named: Any) -> str:
        forked = [str(warm.programs / "python"), *command[1:]] if command[1] == "-P" else command
        return run_fresh(forked, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "run_fresh", run)
        yield


@pytest.fixture(scope="module")
def exported(warm_reloads: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    masks = adapt(topology, project(topology, random_masks(topology, 3).score, 0.4), 0.4, "budget", 4, 8, layout=layout)
    update = random_update(topology, seed=4)
    out = tmp_path / "out"
    size = compact(dense, masks, update, out, layout)
    if gguf:
        write_gguf(out, out / "model.gguf", gguf)  # type: ignore[arg-type]
    input_ids = prompt_ids(AutoTokenizer.from_pretrained(dense), 24)
    reference = Reference("masked dense model", input_ids, masked_dense_logits(dense, masks, update, input_ids))
    first = against_reference("masked = compact", reference, compact_logits(out, input_ids), BOUND)
    made = Provenance(
        Base.of(dense),
        layout,
        {axis: kept.tolist() for axis, kept in masks.widths().items()},
        MADE_WITH,
        sizes(topology, masks, size),
    )
    return out, certify(out, reference, BOUND, made, [first])


@pytest.mark.parametrize("layout", ["uneven", "uniform", "padded"])
def test_an_export_is_certified_and_verifies_elsewhere(layout: Layout, tmp_path: Path) -> None:
    out, checks = export(tmp_path, layout, gguf="f32")
    assert [check.passed for check in checks] == [True] * 4
    require(out, checks)
    written = json.loads((out / "parity.json").read_text())
    for check in checks:
        assert written["checks"][check.name]["passed"]
        figures, bounds = (written["checks"][check.name][kind] for kind in ("figures", "bounds"))
        assert all(figures[name] == 1 if bound == 1 else 0 <= figures[name] <= BOUND for name, bound in bounds.items())
        assert len(bounds) == 2
    assert written["checks"]["llama.cpp from model.gguf"]["figures"]["tokens"] == 32
    assert str(tmp_path) not in (out / "parity.json").read_text() + (out / "README.md").read_text()
    assert ("trust_remote_code=True" in (out / "README.md").read_text()) == (layout == "uneven")
    shutil.rmtree(tmp_path / "dense")
    moved = Path(shutil.move(out, tmp_path / "elsewhere"))
    assert "lm_head.weight" in Checkpoint.of(moved).info  # what looks for weights finds weights alone
    again = verify(moved)
    assert [check.name for check in again] == [check.name for check in checks[1:]]
    assert all(check.passed for check in again)
    if layout != "padded":  # it has the lines of uniform
        assert_runs_in_a_terminal(python_block(moved / "README.md"), moved, tmp_path / "home")


def test_a_directory_verifies_in_processes_of_their_own(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run_fresh", run_fresh)
    assert all(check.passed for check in verify(out))


def python_block(file: Path) -> str:
    """The first block of Python in a Markdown file that loads a tokenizer."""
    blocks = re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)
    return next(block for block in blocks if "AutoTokenizer" in block)


def assert_runs_in_a_terminal(code: str, directory: Path, home: Path) -> None:
    """Run code in a process whose input and output are a terminal; it shows one line, the generated text."""
    # As where torchao is not installed: it writes about libraries of its own that it does not find.
    command = [sys.executable, "-P", "-c", f"import sys; sys.modules['torchao'] = None\n{code}"]
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=directory, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 4096):
                shown += block
        except OSError:  # Linux: the other end is closed
            os.close(ours)
    text = shown.decode()
    assert child.returncode == 0, text
    assert "[y/N]" not in text
    assert re.fullmatch(r"\s*<\|bos\|> ?Th.*\s*", text), text


def test_the_lines_of_the_readme_run_in_a_terminal(out: Path, tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "compact").symlink_to(out)
    assert_runs_in_a_terminal(python_block(REPOSITORY / "README.md"), tmp_path, tmp_path / "home")


def test_the_bound_fails_a_model_that_is_another(out: Path) -> None:
    reference = read_certificate(out).reference
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    logits = compact_logits(out, reference.input_ids)
    check = against_reference("masked = compact", reference, logits, BOUND)
    assert check.passed is False
    with pytest.raises(ValueError, match="masked = compact: FAILED"):
        require(out, [check])
    again = certify(out, reference, BOUND, Provenance.read(out))
    assert [check.passed for check in again] == [False, True]  # it generates consistently, but something else
    assert [check.passed for check in verify(out)] == [False, True]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_bound_is_relative_to_the_logits(scale: float) -> None:
    """Rounding of large logits is no fault, and a fault in small ones is found."""
    logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)) * scale
    reference = Reference("masked dense model", torch.zeros(2, 4, dtype=torch.int64), logits)
    for share, passed in [(0.5, True), (3.0, False)]:
        moved = logits + share * BOUND * logits.abs().max()
        assert against_reference("masked = compact", reference, moved, BOUND).passed is passed


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


def _tear_the_certificate(out: Path) -> str:
    (out / "parity.json").write_text("{")
    return "damaged certificate"


def _take_the_bound_away(out: Path) -> str:
    _forge(out, bound=None)
    return "damaged certificate"


def _lose_the_reference(out: Path) -> str:
    (out / "parity.tensors").unlink()
    _forge(out)
    return "parity.tensors: holds no reference"


def _cut_the_weights(out: Path) -> str:
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    _forge(out)
    return "transformers does not run it in a fresh process"


def _forge(out: Path, **changes: object) -> None:
    """A certificate is no signature: whoever changes a file can write its hash too."""
    certificate = json.loads((out / "parity.json").read_text()) | changes | {"files": hashes(out)}
    (out / "parity.json").write_text(json.dumps(certificate))


@pytest.mark.parametrize(
    "damage",
    [
        *(_flip_a_weight, _edit_the_config, _add_code, _lose_the_tokenizer),
        *(_tear_the_certificate, _take_the_bound_away, _lose_the_reference, _cut_the_weights),
    ],
)
def test_damage_is_named(damage: Callable[[Path], str], out: Path) -> None:
    with pytest.raises(DamagedDirectoryError, match=damage(out)):
        verify(out)


def test_unknown_code_is_not_run(out: Path, tmp_path: Path) -> None:
    modeling, ran = out / "modeling_tvaprune.py", tmp_path / "ran"
    modeling.write_text(modeling.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    _forge(out)
    with pytest.raises(ValueError, match=r"modeling_tvaprune\.py: code that is not"):
        verify(out)
    assert not ran.exists()
    assert all(check.passed for check in verify(out, trust_remote_code=True))
    assert ran.exists()


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_code_that_lies_elsewhere_is_not_run(file: str, out: Path, tmp_path: Path) -> None:
    """transformers follows both files to another directory and imports what it finds there."""
    elsewhere, ran = tmp_path / "elsewhere", tmp_path / "ran"
    shutil.copytree(out, elsewhere)
    modeling = elsewhere / "modeling_tvaprune.py"
    modeling.write_text(modeling.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    if file == "config.json":
        config = json.loads((out / file).read_text())
        config["auto_map"] = {name: f"{elsewhere}--{value}" for name, value in config["auto_map"].items()}
    else:
        config = {"base_model_name_or_path": str(elsewhere), "peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    (out / file).write_text(json.dumps(config))
    _forge(out)
    with pytest.raises(ValueError, match=rf"{file}: .*--trust-remote-code"):
        verify(out)
    assert not ran.exists()


def test_a_stock_layout_leaves_nothing_of_an_uneven_one(tmp_path: Path) -> None:
    out, _ = export(tmp_path, "uneven", gguf="f32")
    again, checks = export(tmp_path, "padded")
    assert again == out
    assert all(check.passed for check in checks)
    assert not list(out.glob("*.py")) + list(out.glob("*.gguf"))


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_of_another_model_fails(kind: str, tmp_path: Path) -> None:
    out, checks = export(tmp_path, gguf=kind)
    assert all(check.passed for check in checks)
    figures = checks[-1].figures
    assert figures["tokens"] == 32
    assert figures["first_token_logprob_diff"] <= figures["max_abs_logprob_diff"] < (1e-3 if kind == "f32" else 2)
    weights = load_file(out / "model.safetensors")
    for name in [name for name in weights if name.endswith("q_proj.weight")]:
        weights[name] = weights[name].flip(0)  # as if the rotary pairs were in the other order
    other = Path(shutil.copytree(out, tmp_path / "other", ignore=shutil.ignore_patterns("parity.*")))
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    write_gguf(other, out / "model.gguf", kind)  # type: ignore[arg-type]
    stored = load_file(out / "parity.tensors")
    reference = Reference("masked dense model", stored["input_ids"], stored["logits"])
    *_, check = fresh_checks(out, reference, BOUND, trust_remote_code=True)
    assert check.name == "llama.cpp from model.gguf"
    assert check.passed is False


def test_without_llama_cpp_the_check_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tvaprune.proof.checks.find_spec", lambda name: None)
    out, checks = export(tmp_path, gguf="f32")
    assert checks[-1].passed is None
    assert "not run, xllamacpp is not installed" in str(checks[-1])
    require(out, checks)


def test_the_command_line(out: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["verify", str(out)])
    assert shown.exit_code == 0
    assert "reloaded in a fresh process: passed" in shown.output
    _flip_a_weight(out)
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 1
    missing = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert missing.exit_code == 1
    assert "not a directory that tvaprune exported" in str(missing.exception)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.00100004, "0.00100004 of 0.001"), (0.0010000004, "0.0010000004 of 0.001"), (2e-5, "2e-05")]
)
def test_a_check_shows_on_which_side_of_its_bound_a_figure_is(value: float, shown: str) -> None:
    """A failed one used to say "0.001 of 0.001"."""
    check = bounded_check("parity", {"max_rel_logit_diff": value}, {"max_rel_logit_diff": 0.001})
    assert check.passed is (value <= 0.001)
    assert f"max_rel_logit_diff {shown}" in str(check)


def test_the_card_says_where_it_comes_from_and_how_to_load_it(out: Path) -> None:
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "someone/tiny"
    assert card.data.license == "apache-2.0"
    assert "trust_remote_code=True" in card.text
    assert "| layer | key-value heads | intermediate |" in card.text
    assert '"method": "tva"' in card.text
    made = Provenance.read(out)
    assert made.made_with == MADE_WITH
    assert made.layout == "uneven"
    assert made.base.source["revision"] == "abc"
    assert made.base.sha256.keys() == {"model.safetensors"}
    assert made.widths["intermediate"] == load_config(out).intermediate_sizes
    assert made.figures["params_kept"] == sum(t.numel() for t in load_file(out / "model.safetensors").values())


def test_a_base_without_a_record_has_a_card_too(tmp_path: Path) -> None:
    dense = save_tiny_model("llama", tmp_path)
    assert Base.of(dense).source == {}
    assert Base.of(dense).license is None


def test_what_had_no_influence_is_not_what_it_was_made_with() -> None:
    masks = LearnMasksParams.load(PARAMS)
    for method, kind in METHOD_OPTIONS.items():
        used = masks.model_copy(update={"method": method}).used()["learn_masks"]
        assert used.keys() == {"sparsity", "seed", "method", "axes", method}
        assert used[method].keys() == {field.name for field in fields(kind)}
    deterministic = masks.model_copy(update={"tva": replace(masks.tva, ablation="deterministic")}).used()["learn_masks"]
    assert {field.name for field in fields(masks.tva)} - deterministic["tva"].keys() == {
        "curvature_windows", "curvature_tokens"
    }  # fmt: skip
    assert CompactParams.load(PARAMS).used()["compact"].keys() == {"layout", "gguf"}
    tuned = FinetuneLoraParams.load(PARAMS).model_copy(update={"teacher": "none"}).used()["finetune_lora"]
    assert not tuned.keys() & {"enabled", "save_every", "distillation_weight"}
    assert tuned.keys() >= {"seed", "rank", "ce_weight", "validate_every"}


def test_a_tie_may_part_generations_and_nothing_else_may() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.5, 0.5 - 1e-5], [3.0, 0.0]]])
    ours = torch.tensor([[0, 0, 0]])
    assert same_choices(logits, ours, torch.tensor([[0, 1, 1]]), tie=1e-4) == 1
    assert same_choices(logits, ours, torch.tensor([[0, 1, 1]]), tie=1e-6) == 0
    assert same_choices(logits, ours, torch.tensor([[1, 0, 0]]), tie=1e-4) == 0


@pytest.mark.parametrize("says_nothing", [False, True])
def test_tokens_that_llama_cpp_does_not_name_are_not_compared(
    says_nothing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server gives no probabilities of a token that is a part of a character."""
    out, _ = export(tmp_path, gguf="f32")
    stored, whole = load_file(out / "parity.tensors"), checks.run_fresh

    def answer(command: list[str], what: Path, runtime: str, **named: Any) -> str:
        said = whole(command, what, runtime, **named)
        if runtime != "llama.cpp":
            return said
        found = json.loads(said.splitlines()[-1])
        found["chosen"][0] = found["chosen"][0][:3]
        for row in range(len(found["chosen"])) if says_nothing else (1,):
            found["chosen"][row], found["first"][row] = [], [[], []]
        return json.dumps(found)

    monkeypatch.setattr(checks, "run_fresh", answer)
    reference = Reference("masked dense model", stored["input_ids"], stored["logits"])
    *_, check = fresh_checks(out, reference, BOUND, trust_remote_code=True)
    assert check.passed is (None if says_nothing else True)
    if not says_nothing:
        assert check.figures["tokens"] == 0  # of the second prompt
        assert check.figures["token_agreement"] == 1
