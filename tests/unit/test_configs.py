"""Every file of configs/ by a dry run: it fits its model, meets its target, and fits the card that its name says."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_model
from tests.unit.test_finetune import OPTIONS
from tools import try_steps
from tvaprune.architecture.parameter_counts import kept_decoder_parameters, shared_parameters
from tvaprune.architecture.topology import Topology
from tvaprune.artifacts import SOURCE_FILE
from tvaprune.checkpoint.config import load_config
from tvaprune.distributed import Process
from tvaprune.estimate import config_directory, memory, report, size_lines, sizes
from tvaprune.gates.memory import LiveBytes
from tvaprune.inputs.sources import describe
from tvaprune.masks.projection import UnreachableSparsityError
from tvaprune.methods import check_request
from tvaprune.options.axes import AXES
from tvaprune.options.gates import TvaOptions
from tvaprune.options.masks import MaskRequest
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.recovery.lora import add_lora
from tvaprune.recovery.memory import finetuning_memory
from tvaprune.recovery.teacher import Teacher
from tvaprune.recovery.training import _Trainer

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
# As published: by the models' own cards, and counted once from GlassLLM's file.
PARAMETERS = {"Meta-Llama-3-8B": 8_030_261_248, "Mistral-7B-v0.1": 7_241_732_096, "glassllm": 852_608}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_widths_and_parameters_of_a_dry_run(path: Path) -> None:
    model = config_directory(path)
    found = sizes(path, model)
    assert found.parameters_dense == PARAMETERS[model.name]
    topology, target = Topology.of(found.config), LearnMasksParams.load(path).sparsity
    kept = kept_decoder_parameters(topology, found.masks.keep)
    hidden = int(found.masks.keep["hidden"].sum())
    tied = found.student.tie_word_embeddings
    assert found.parameters_kept == kept + shared_parameters(topology, hidden, found.config.vocab_size, tied)
    adapting = AdaptDimensionsParams.load(path)
    if adapting.rounding == "budget":
        assert target <= found.sparsity < target + 0.005
    else:
        assert found.sparsity == pytest.approx(target, abs=0.03)
    multiples = adapting.multiples()
    assert multiples is not None
    assert hidden % multiples[0] == 0
    assert (found.masks.keep["intermediate"].sum(-1) % multiples[1] == 0).all()
    shown = "\n".join(size_lines(found))
    assert f"{found.parameters_kept:,} parameters" in shown
    assert f"hidden: {hidden}, of {topology.hidden}" in shown


# The tightest of the published models is in CI.
IN_CI = ("glassllm", "llama-3-8b-24gb")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in IN_CI else pytest.mark.nightly)
        for path in CONFIGS
    ],
)
def test_the_card_that_the_name_says_has_room(path: Path) -> None:
    """A tenth is left for kernels' workspaces, fragmentation and CUDA's own context."""
    card = {"paper": 80, "glassllm": 1}.get(path.stem) or int(re.search(r"(\d+)gb$", path.stem)[1])  # type: ignore[index]
    needed = memory(sizes(path, config_directory(path)))
    assert set(needed) == {"learn_masks", "finetune_lora"}
    for stage, parts in needed.items():
        assert parts["total"] <= 0.9 * card * 1e9, stage
        assert parts["total"] >= parts["weights"]


def test_the_estimate_runs_in_a_process_of_its_own() -> None:
    """Other tests of this process have registered the class of a pruned model's config."""
    command = [sys.executable, "-m", "tvaprune", "estimate", "configs/glassllm.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()[:3]] == [
        "configs/glassllm.yaml",
        "dense",
        "pruned",
    ]
    assert "finetune_lora:" in done.stdout


def test_of_a_repository_that_is_not_here_the_config_alone_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "params.yaml", []
    path.write_text(CONFIGS[1].read_text().replace("meta-llama/Meta-Llama-3-8B", "someone/else"))

    def download(repo: str, file: str, revision: str) -> str:
        asked.append((repo, file))
        return str(REPOSITORY / "configs/models/Mistral-7B-v0.1" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert config_directory(path).name == "Mistral-7B-v0.1"
    assert asked == [("someone/else", "config.json")]


def test_the_model_of_an_earlier_run_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fetched = tmp_path / "params.yaml", tmp_path / "data" / "model"
    path.write_text(CONFIGS[1].read_text().replace("meta-llama/Meta-Llama-3-8B", "someone/else"))
    source = FetchInputsParams.load(path).model
    tiny_model("llama").config.save_pretrained(fetched)
    elsewhere = REPOSITORY / "configs/models/Mistral-7B-v0.1"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, revision: str(elsewhere / file))
    for record, expected in (
        (None, elsewhere),
        (describe(source) | {"repo": "someone/before"}, elsewhere),
        (describe(source) | {"license": "found in its readme"}, fetched),
    ):
        if record is not None:
            (fetched / SOURCE_FILE).write_text(json.dumps(record))
        assert config_directory(path) == expected
    (fetched / SOURCE_FILE).unlink()
    assert next(report(path, None)) == f"{path} on someone/else"


def test_a_packaged_model_without_a_config_here_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((REPOSITORY / "configs/glassllm.yaml").read_text().replace("name: glassllm", "name: another"))
    with pytest.raises(FileNotFoundError, match=r"fetch_inputs\.model is another, .*--model"):
        config_directory(path)


def test_the_shapes_are_those_of_the_models() -> None:
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(Path("configs/models") / name))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_what_no_mask_reaches_is_refused_without_a_search_through_every_unit() -> None:
    """8B parameters: bringing back units one by one took minutes."""
    topology = Topology.of(load_config(Path("configs/models/Meta-Llama-3-8B")))
    check_request(MaskRequest("tva", TvaOptions(), 0.9, AXES), topology)
    with pytest.raises(UnreachableSparsityError, match=r"sparsity = 0\.9"):
        check_request(MaskRequest("tva", TvaOptions(), 0.9, ("kv_heads",)), topology)


ESTIMATED = replace(OPTIONS, dropout=0.0, ce_weight=1.0)


def estimate(teacher: str = "online", checkpointing: bool = False, layers: int = 3) -> dict[str, int]:
    config = tiny_model("llama", layers=layers).config
    options = replace(ESTIMATED, teacher=teacher, gradient_checkpointing=checkpointing)
    return finetuning_memory(config, config, options, 64, torch.float32, "cpu")


def test_the_estimate_of_finetuning_is_what_a_real_step_allocates() -> None:
    """The same count around the real trainer's step, on models that are really there."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.randint(0, 128, (4, 64), dtype=torch.int32)
    model, process = add_lora(student, ESTIMATED), Process(torch.device("cpu"))
    trainer = _Trainer(model, Teacher(teacher, ids), ids, ids[:2], ESTIMATED, process, [[0, 1]], teacher_nll=0.0)
    with LiveBytes() as live:
        trainer._add_gradients()
        real = live.highest
    assert estimate()["step"] == pytest.approx(real, rel=0.15)


def test_the_estimate_for_a_gpu_has_its_chunks_of_the_loss_whatever_the_threads() -> None:
    """With a large vocabulary the loss's chunks are most of a step; those of a CPU grow with its threads."""
    config = tiny_model("llama", vocab_size=50_000, layers=1).config
    options = replace(ESTIMATED, teacher="none", batch_size=8)
    threads, found = torch.get_num_threads(), {}
    try:
        for device, count in (("cuda", 1), ("cuda", 2), ("cpu", 1), ("cpu", 2)):
            torch.set_num_threads(count)
            found[device, count] = finetuning_memory(config, config, options, 64, torch.bfloat16, device)["step"]
    finally:
        torch.set_num_threads(threads)
    assert found["cuda", 1] == found["cuda", 2]
    assert found["cpu", 1] < found["cpu", 2]


def test_what_the_estimate_of_finetuning_counts() -> None:
    online, cached, alone = (estimate(teacher) for teacher in ("online", "cached", "none"))
    assert online["teacher"] == online["weights"]
    assert cached["teacher"] == 128 * 64 * 4  # the head
    assert alone["teacher"] == 0
    assert online["total"] == online["weights"] + online["teacher"] + online["adapter"] + online["step"]
    assert estimate(checkpointing=True, layers=8)["step"] < 0.7 * estimate(layers=8)["step"]


def test_some_steps_of_a_file_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    try_steps.main(REPOSITORY / "configs/glassllm.yaml", steps=3)
    said = capsys.readouterr().out
    for stage in ("learn_masks", "finetune_lora"):
        assert re.search(rf"{stage}: \d+\.\d+ s a step, \d+\.\d minutes for 200; .* estimated 0\.\d+", said)
    assert 0 < float(re.search(r"a step takes (\d+\.\d\d) times one without gates", said)[1]) < 100  # type: ignore[index]


def test_some_steps_of_both_phases_of_grasprune_are_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = YAML()
    content = yaml.load(REPOSITORY / "configs/glassllm.yaml")
    content["learn_masks"].update(method="grasprune", axes=["intermediate", "kv_heads"])
    content["finetune_lora"]["enabled"] = False
    yaml.dump(content, tmp_path / "params.yaml")
    try_steps.main(tmp_path / "params.yaml", REPOSITORY / "configs/models/glassllm", steps=3)
    assert re.search(r"learn_masks: .* minutes for 2560; .* estimated 0\.\d+", capsys.readouterr().out)
