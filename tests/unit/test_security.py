"""Hostile files run nothing and write nowhere else, and no credential is written down; see SECURITY.md."""

import ast
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.bad_inputs.workspace import build, run, set_param
from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tvaprune.checkpoint.loading import load
from tvaprune.inputs import packages
from tvaprune.inputs.model import fetch_model
from tvaprune.inputs.packages import extract
from tvaprune.inputs.sources import InputError, ModelLocal, ModelSource, TextSource, hub_errors
from tvaprune.options.secrets import without_secrets
from tvaprune.proof import checks
from tvaprune.proof.certificate import Reference, write_certificate

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "aB3" * 11


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every call in the code: the file, what is called, and its keyword arguments, as source."""
    for path in sorted(path for room in ("tvaprune", "stages", "tools") for path in (REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
                yield path.relative_to(REPOSITORY).as_posix(), ast.unparse(node.func), keywords


def imports() -> Iterator[tuple[str, str]]:
    for path in sorted(path for room in ("tvaprune", "stages", "tools") for path in (REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((path.relative_to(REPOSITORY).as_posix(), name.split(".")[0]) for name in names)


def test_pickles_are_read_in_one_place() -> None:
    readers = {"pickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert {file for file, name in imports() if name in readers} == {"tvaprune/masks/published.py"}
    loads = [(file, name, words) for file, name, words in calls() if name in ("torch.load", "np.load", "numpy.load")]
    assert len(loads) == 3
    for file, name, words in loads:
        safe = ("weights_only", "True") if name == "torch.load" else ("allow_pickle", "False")
        assert words.get(safe[0]) == safe[1], file


def test_archives_are_unpacked_in_one_place_and_no_code_is_evaluated() -> None:
    assert {file for file, name in imports() if name in ("zipfile", "tarfile")} == {"tvaprune/inputs/packages.py"}
    assert not [file for file, name, _ in calls() if name.rpartition(".")[2] in ("unpack_archive", "extractall")]
    # The tool that runs published code to record its scores is not a part of the pipeline.
    assert {file for file, name, _ in calls() if name in ("eval", "exec")} == {"tools/official/record.py"}


def test_remote_code_is_off_wherever_a_model_is_loaded() -> None:
    """A value other than False is the user's own word: the parameter, or the option of verify."""
    said = {(file, words["trust_remote_code"]) for file, _, words in calls() if "trust_remote_code" in words}
    assert {file for file, value in said if value != "False"} == {
        "tvaprune/inputs/model.py",
        "tools/_vllm_speed_script.py",  # runs in the server that is asked for
        *("tvaprune/export/seal.py", "tvaprune/proof/reload_script.py", "tvaprune/verify.py"),
    }
    assert [file for file, value in said if value == "True"] == ["tools/_vllm_speed_script.py"]
    for file, name, words in calls():
        if name == "AutoModelForCausalLM.from_pretrained" and file.startswith(("tvaprune", "stages")):
            assert "gguf_file" in words or words["use_safetensors"] == "True", file


def test_no_temporary_file_has_a_fixed_name() -> None:
    for path in (path for room in ("tvaprune", "stages", "tools") for path in (REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "/var/tmp", "/dev/shm")), path
    assert not [file for file, name, _ in calls() if name.rpartition(".")[2] == "mktemp"]


def archive(path: Path, *members: zipfile.ZipInfo | str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for member in members:
            file.writestr(member, "content")
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("member", "asked", "named"),
    [
        ("data/../../out.txt", "data/", "leads out of its folder"),
        ("../out.txt", "../out.txt", "leads out of its folder"),
        ("/out.txt", "/out.txt", "leads out of its folder"),
        ("data\\..\\out.txt", "data\\..\\out.txt", "leads out of its folder"),
        (link("data/link"), "data/", "is a link"),
    ],
)
def test_an_archive_writes_into_its_folder_alone(
    member: zipfile.ZipInfo | str, asked: str, named: str, tmp_path: Path
) -> None:
    wheel = archive(tmp_path / "a.whl", "data/first.txt", member)
    with pytest.raises(InputError, match=rf"a\.whl: member .* {named}"):
        extract(wheel, asked, tmp_path / "folder" / "files")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.whl"]


def test_an_archive_is_limited_in_size_and_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = archive(tmp_path / "a.whl", "data/one.txt", "data/two.txt")
    monkeypatch.setattr(packages, "_LARGEST_BYTES", 10)
    with pytest.raises(InputError, match="unpacks to more than 10 bytes; not unpacked"):
        extract(wheel, "data/", tmp_path / "files")
    assert extract(wheel, "data/one.txt", tmp_path / "files").read_text() == "content"
    wheel.write_bytes(wheel.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"a\.whl: 'data/' cannot be unpacked"):
        extract(wheel, "data/", tmp_path / "files")


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose repository has code of its own, which leaves a mark when it runs."""
    directory = save_tiny_model("llama", tmp_path / "repository")
    tiny_tokenizer(directory)
    code = (
        "from transformers import LlamaForCausalLM\nopen({!r}, 'w').close()\nclass Own(LlamaForCausalLM):\n    pass\n"
    )
    (directory / "modeling_own.py").write_text(code.format(str(tmp_path / "ran")))
    name_code(directory, AutoModelForCausalLM="modeling_own.Own")
    return directory


def name_code(directory: Path, **auto_map: str) -> None:
    config = json.loads((directory / "config.json").read_text()) | {"auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(config))


def test_a_repositorys_code_is_refused(with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: auto_map .*; it was not run.*trust_remote_code: true"):
        fetch_model(ModelLocal(path=with_code), tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_trusted_repository_still_has_to_give_a_stock_model(
    with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trusted = ModelLocal(path=with_code, trust_remote_code=True)
    with pytest.raises(InputError, match="Own is code of the repository's own"):
        fetch_model(trusted, tmp_path / "out", tmp_path / "work")
    assert (tmp_path / "ran").exists()
    name_code(with_code, AutoModelForSequenceClassification="modeling_own.Own")
    fetch_model(trusted, tmp_path / "out", tmp_path / "work")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("security") / "base")


def test_an_altered_modeling_file_is_refused_before_it_runs(base: Path) -> None:
    """Also where whoever altered it wrote the certificate anew; and our own loader does not read it at all."""
    compact, ran = base / "artifacts" / "compact", base / "ran"
    modeling = compact / "modeling_tvaprune.py"
    modeling.write_text(f"open({str(ran)!r}, 'w').close()\n" + modeling.read_text())
    assert "modeling_tvaprune.py: changed since" in run(base, "tvaprune verify", "artifacts/compact").message
    reference = Reference("masked dense model", torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, 320))
    write_certificate(compact, reference, [], 1e-4, trust_remote_code=True)
    recorded = json.loads((compact / "parity.json").read_text())["files"]
    assert "modeling_tvaprune.py" in recorded
    said = run(base, "tvaprune verify", "artifacts/compact")
    assert said.exit_code == 1
    assert "modeling_tvaprune.py: code that is not this version's" in said.message
    load(compact)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["repo", "revision", "license"])
@pytest.mark.parametrize("secret", [TOKEN, "https://me:hunter2@index.example/simple", "AKIA" + "A1B2" * 4])
def test_a_credential_in_a_source_is_refused_and_not_repeated(key: str, secret: str) -> None:
    source = {"source": "hub", "repo": "a/b", "revision": "main", "license": "MIT", key: secret}
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(ModelSource).validate_python(source)
    assert [problem["msg"].split(" ")[0] for problem in refused.value.errors()] == [key]


def test_params_yaml_with_a_credential_is_refused_in_one_line_without_it(base: Path) -> None:
    before = (base / "params.yaml").read_text()
    for number, key in enumerate(("path", "kind")):
        set_param(base, f"fetch_inputs.calibration.sources.{number}.{key}", f"https://me:hunter2@x.example/{TOKEN}")
    said = run(base, "stages.check_params")
    (base / "params.yaml").write_text(before)
    assert said.exit_code == 1
    assert "fetch_inputs.calibration.sources.0.path holds a password or a token" in said.message
    assert "hunter2" not in said.message
    assert TOKEN not in said.message


def test_messages_of_pip_and_of_the_hub_are_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"ERROR: no match in https://me:hunter2@index.example/simple with {TOKEN}"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    content: dict[str, Any] = {"label": "a", "kind": "a", "name": "a", "version": "1", "sha256": "0" * 64}
    content |= {"license": "MIT", "format": "text", "member": "a.txt", "source": "package"}
    with pytest.raises(InputError, match=r"https://\*\*\*@index\.example/simple with \*\*\*") as refused:
        packages.fetch_members(TypeAdapter(TextSource).validate_python(content), ["a.txt"], tmp_path)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(InputError, match=r"with \*\*\*$"), hub_errors("a/b"):
        raise OSError(said)
    assert without_secrets("no secret at https://index.example/a@b") == "no secret at https://index.example/a@b"


@pytest.mark.parametrize(("key", "value"), [("name", "--pre"), ("version", "1 --pre")])
def test_a_package_is_no_option_of_pip(key: str, value: str) -> None:
    content = {"source": "package", "name": "a", "version": "1", "sha256": "0" * 64, "license": "MIT"}
    content |= {"format": "gguf", "member": "a.gguf", key: value}
    with pytest.raises(ValidationError, match="should match pattern"):
        TypeAdapter(ModelSource).validate_python(content)


def test_what_a_directory_runs_has_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def record(*_: Any, env: dict[str, str], **__: Any) -> Any:
        seen.update(env)
        return subprocess.CompletedProcess([], 0, "", "")

    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "OPENAI_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setattr(checks.subprocess, "run", record)
    checks.run_fresh(["true"], tmp_path, "transformers", cwd=tmp_path)
    assert seen["PATH"] == os.environ["PATH"]
    assert "hunter2" not in seen.values()
