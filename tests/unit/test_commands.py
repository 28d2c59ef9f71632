"""The command line of the package: verbs, help, errors, and the pipelines that `init` writes."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from ruamel.yaml import YAML
from tokenizers import processors
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tvaprune import VERSION_FILE, __version__, commands, template
from tvaprune.checkpoint.loading import load
from tvaprune.errors import TRACEBACK, clear_errors
from tvaprune.inputs.sources import InputError
from tvaprune.params.everything import check_everything
from tvaprune.params.loading import ParameterError

VERBS = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
REPOSITORY = Path(__file__).parents[2]


def invoke(*arguments: str | Path, text: str | None = None) -> Any:
    return CliRunner().invoke(commands.app, [str(each) for each in arguments], input=text, catch_exceptions=False)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_and_every_option_too(verb: str) -> None:
    assert VERBS[verb].help
    assert " ".join(VERBS[verb].help.split()) in " ".join(invoke(verb, "--help").output.split())
    for parameter in VERBS[verb].params:
        assert getattr(parameter, "help", None), f"{verb}: {parameter.name} has no help"


def test_the_verbs_are_those_of_the_documentation() -> None:
    assert set(VERBS) == {"init", "prune", "generate", "chat", "verify", "estimate", "import-masks", "results"}


def test_help_and_version_need_no_torch() -> None:
    """So that the shell's completion is quick."""
    program = "import sys; from tvaprune import commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert invoke("--version").output == f"{__version__}\n"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tvaprune", *arguments]
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_an_error_is_one_line_and_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    arguments = ("init", str(tmp_path), "--model", "no/such/model", "--text", "x")
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no/such/model: neither a directory with a config.json nor")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in run("--traceback", *arguments).stderr
    assert "Traceback" in run(*arguments, **{TRACEBACK: "1"}).stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room, then run it again"),
        (PermissionError(errno.EACCES, "Permission denied", "metrics/x.json"), "metrics/x.json: Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a/b: Not a directory"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "a: File exists, and is not a directory"),
        (InputError("no text"), "no text"),
        (KeyError("x"), f"KeyError: 'x' (set {TRACEBACK}=1 to see where)"),
    ],
)
def test_the_line_of_an_error(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, clear_errors(unexpected_too=True):
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_stage_keeps_the_traceback_of_what_it_does_not_expect() -> None:
    with pytest.raises(KeyError), clear_errors():
        raise KeyError("x")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_tokenizer(save_tiny_model("llama", folder / "model"))
    (folder / "text.txt").write_text("The bank's 1234 engineers don't think that they pay. " * 400)
    return folder


@pytest.fixture
def files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` without git and DVC, which take seconds to start."""
    monkeypatch.setattr(template, "_repositories", lambda directory: iter(()))


def wishes(inputs: Path, **changed: Any) -> template.Wishes:
    return template.Wishes(**{"model": str(inputs / "model"), "text": str(inputs / "text.txt"), **changed})


def test_a_link_keeps_its_name(inputs: Path, files_alone: None, tmp_path: Path) -> None:
    """As in the hub's cache, whose files have no endings; also inside the pipeline's own directory."""
    blob, link, own = tmp_path / "blobs" / "0123abcd", tmp_path / "text.txt", tmp_path / "mine" / "own.txt"
    for path in (blob, own):
        path.parent.mkdir()
    blob.write_bytes((inputs / "text.txt").read_bytes())
    for path in (link, own):
        path.symlink_to(blob)
    for named, written in ((link, str(link)), (own, "own.txt"), (tmp_path / "mine" / ".." / "text.txt", str(link))):
        list(template.init(tmp_path / "mine", wishes(inputs, text=str(named)), force=True))
        params = YAML(typ="safe").load(tmp_path / "mine" / "params.yaml")
        assert params["fetch_inputs"]["calibration"]["sources"][0]["path"] == written


def test_a_pipeline_for_a_local_model_and_text(inputs: Path, tmp_path: Path) -> None:
    said = list(template.init(tmp_path / "mine", wishes(inputs, sparsity=0.3)))
    assert [line.partition(" ")[0] for line in said] == ["wrote"] * 5 + ["ran", "ran"]
    check_everything(tmp_path / "mine" / "params.yaml")
    params = YAML(typ="safe").load(tmp_path / "mine" / "params.yaml")
    assert params["sparsity"] == 0.3
    assert params["fetch_inputs"]["model"] == {"source": "local", "path": str(inputs / "model")}
    assert params["fetch_inputs"]["heldout"]["sources"][0]["label"] == "wikipedia"
    own = YAML(typ="safe").load(tmp_path / "mine" / "dvc.yaml")["stages"]
    repositorys = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
    assert own.keys() == repositorys.keys()
    for name, stage in repositorys.items():
        data = [dep for dep in stage["deps"] if not dep.endswith(".py")]
        assert own[name] == stage | {"deps": [*data, VERSION_FILE]} if "deps" in stage else own[name] == stage
    assert (tmp_path / "mine" / VERSION_FILE).read_text() == f"{__version__}\n"
    assert (tmp_path / "mine" / ".dvc" / "config").is_file()


@pytest.mark.usefixtures("files_alone")
def test_paths_in_the_pipelines_folder_are_relative(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    list(template.init(tmp_path, wishes(tmp_path, text=str(tmp_path / "text.jsonl"))))
    params = YAML(typ="safe").load(tmp_path / "params.yaml")["fetch_inputs"]
    assert params["model"]["path"] == "model"
    assert params["calibration"]["sources"][0]["path"] == "text.jsonl"


@pytest.mark.usefixtures("files_alone")
def test_a_name_that_is_no_path_is_a_repository_of_the_hub(inputs: Path, tmp_path: Path) -> None:
    asked = wishes(inputs, model="meta-llama/Llama-3.1-8B", heldout="someone/texts")
    said = list(template.init(tmp_path / "mine", asked))
    repository = "no such path here, so it is taken as a repository of the hub"
    assert said[0] == f"meta-llama/Llama-3.1-8B: {repository}"
    assert said[1] == f"someone/texts: {repository}; 20,000 of its documents are sampled"
    params = YAML(typ="safe").load(tmp_path / "mine" / "params.yaml")
    model, (heldout,) = params["fetch_inputs"]["model"], params["fetch_inputs"]["heldout"]["sources"]
    assert model == {"source": "hub", "repo": "meta-llama/Llama-3.1-8B", "revision": "main"}
    assert (heldout["repo"], heldout["label"], heldout["documents"]) == ("someone/texts", "heldout", 20_000)
    assert set(params["eval_perplexity"]["test"]) == {"heldout"}


@pytest.mark.parametrize(
    "changed",
    [{"model": "nowhere"}, {"text": "./nowhere.txt"}, {"zeroshot": Path("nowhere")}, {"text": "pyproject.toml"}],
)
def test_what_is_neither_a_path_nor_a_repository_is_refused(
    inputs: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=next(str(value) for value in changed.values())):
        list(template.init(tmp_path / "mine", wishes(inputs, **changed)))
    assert not (tmp_path / "mine").exists()


def test_a_sparsity_out_of_range_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="sparsity = 2"):
        list(template.init(tmp_path / "mine", wishes(inputs, sparsity=2)))


@pytest.mark.usefixtures("files_alone")
def test_files_that_are_there_stay(inputs: Path, tmp_path: Path) -> None:
    list(template.init(tmp_path, wishes(inputs)))
    (tmp_path / "params.yaml").write_text("mine: 1\n")
    with pytest.raises(FileExistsError, match=r"already has params\.yaml, dvc\.yaml"):
        list(template.init(tmp_path, wishes(inputs)))
    assert (tmp_path / "params.yaml").read_text() == "mine: 1\n"
    said = list(template.init(tmp_path, wishes(inputs), force=True))
    assert f"wrote {tmp_path / 'params.yaml'}; what was there is in params.yaml.old" in said
    assert (tmp_path / "params.yaml.old").read_text() == "mine: 1\n"
    list(template.init(tmp_path, wishes(inputs, sparsity=0.3), force=True))
    assert (tmp_path / "params.yaml.old").read_text() == "mine: 1\n"
    assert "sparsity: 0.2" in (tmp_path / "params.yaml.old.1").read_text()


@pytest.mark.usefixtures("files_alone")
def test_what_git_ignored_already_stays_ignored(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("secret.txt\n/data/")
    list(template.init(tmp_path, wishes(inputs)))
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["secret.txt", "/data/"]
    assert sorted(lines) == sorted({"secret.txt", *template.IGNORED.splitlines()})


def test_a_directory_that_git_ignores_is_refused_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("/out/\n")
    with pytest.raises(ValueError, match="out/mine: git ignores it"):
        list(template.init(tmp_path / "out" / "mine", wishes(inputs)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["data/model", "data/model/mine", "data/heldout", "data/../data/zeroshot"])
def test_a_source_that_dvc_would_empty_is_refused_before_anything_is_written(
    place: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    shutil.copytree(inputs / "model", tmp_path / "mine" / place)
    with pytest.raises(ParameterError, match="DVC empties it first, so your files would be lost"):
        list(template.init(tmp_path / "mine", wishes(inputs, model=str(tmp_path / "mine" / place))))
    assert not (tmp_path / "mine" / "params.yaml").exists()


@pytest.mark.usefixtures("files_alone")
def test_renewing_brings_a_pipeline_to_the_installed_version(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="what `tvaprune init` made"):
        list(template.renew(tmp_path))
    list(template.init(tmp_path, wishes(inputs)))
    (tmp_path / VERSION_FILE).write_text("0.0.1\n")
    before = (tmp_path / "dvc.yaml").read_text()
    list(template.renew(tmp_path))
    assert (tmp_path / VERSION_FILE).read_text() == f"{__version__}\n"
    assert (tmp_path / "dvc.yaml").read_text() == before


def test_a_model_is_pruned_and_writes(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVAPRUNE_DTYPE", "float32")
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    out = tmp_path / "pruned"
    options = ["--method", "flap", "--windows", "4", "--sparsity", "0.2"]
    done = invoke("prune", inputs / "model", inputs / "text.txt", out, *options)
    assert f"{out}: " in done.output
    assert load(out).num_parameters() > 0
    with pytest.raises(FileExistsError, match="name another directory"):
        invoke("prune", inputs / "model", inputs / "text.txt", out, *options)
    said = invoke("generate", out, "The bank", "--new-tokens", "4").stdout
    assert said.startswith("The bank")
    assert len(said) > len("The bank\n")
    assert invoke("generate", out, "The bank", "--new-tokens", "4").stdout == said
    assert invoke("chat", out, "--new-tokens", "2", text="The bank\n\n").stdout.startswith("The bank")


def test_an_empty_prompt_without_a_token_that_begins_a_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVAPRUNE_DEVICE", "cpu")
    tiny_tokenizer(save_tiny_model("llama", tmp_path))
    assert invoke("generate", tmp_path, "", "--new-tokens", "2").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the prompt is empty: this model's tokenizer has no token that begins a text"):
        invoke("generate", tmp_path, "")
