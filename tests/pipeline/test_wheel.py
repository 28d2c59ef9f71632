"""From the wheel, in a folder outside the repository: `tvaprune init`, `dvc repro`, a model."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.pipeline.tiny_inputs import SMALL, SMALL_GATES, write_inputs
from tests.pipeline.workspace import Workspace, environment, stages_run
from tvaprune.checkpoint.loading import load

REPOSITORY_FILES = ("dvc.yaml", "params.yaml")
# The parameters of a pipeline for one text to learn on and one to measure on.
SMALLER = {name: values for name, values in SMALL.items() if name != "fetch_inputs"} | {
    "eval_perplexity": {"window": 32, "validation": {"heldout": 4}, "test": {"heldout": 2}}
}


@pytest.fixture(scope="module")
def wheel(scratch: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because the build leaves files in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    source = Workspace.create(folder / "source").root
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("tvaprune-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin of an environment with the wheel in it; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([*command, "--ignore-installed"], check=True, capture_output=True)
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_holds_the_stages_the_command_and_the_repositorys_own_pipeline(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.partition("/")[0] for name in names} == {"stages", "tvaprune", wheel.name[:14] + ".dist-info"}
        assert {"stages/learn_masks.py", "tvaprune/checkpoint/modeling_tvaprune.py"} <= set(names)
        for name in REPOSITORY_FILES:
            assert archive.read(f"tvaprune/pipeline/{name}") == Path(__file__).parents[2].joinpath(name).read_bytes()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "target",
    [pytest.param("compact", marks=pytest.mark.nightly), pytest.param("", marks=pytest.mark.nightly, id="everything")],
)
def test_an_installed_wheel_prunes_a_local_model_with_local_text(installed: Path, tmp_path: Path, target: str) -> None:
    variables = environment() | {"PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"}
    inputs, pipeline = tmp_path / "inputs", tmp_path / "mine"
    write_inputs(inputs)

    def run(*command: str | Path, cwd: Path = tmp_path, code: int = 0) -> str:
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    options = ["--model", "inputs/model", "--text", "inputs/letters", "--heldout", "inputs/stories"]
    said = run("tvaprune", "init", "mine", *options, "--zeroshot", "inputs/zeroshot")
    assert "ran git init in mine" in said
    assert "ran dvc init in mine" in said
    yaml = YAML()
    params = yaml.load(pipeline / "params.yaml")
    for section, values in SMALLER.items():
        params[section].update(values)
    params["learn_masks"]["tva"].update(SMALL_GATES)
    yaml.dump(params, pipeline / "params.yaml")

    dvc = (installed / "python", "-m", "dvc", "repro", *filter(None, [target]))
    assert {"learn_masks", "compact"} <= stages_run(run(*dvc, cwd=pipeline))
    dense, small = (load(path) for path in (inputs / "model", pipeline / "artifacts" / "compact"))
    assert small.num_parameters() < dense.num_parameters()
    assert stages_run(run(*dvc, cwd=pipeline)) == set()
    assert "artifacts/compact: the pruned model" in run("tvaprune", "results", cwd=pipeline)
    if not target:
        assert (pipeline / "metrics" / "zeroshot.json").is_file()
        assert "passed" in run("tvaprune", "verify", "artifacts/finetuned", cwd=pipeline)

    (pipeline / ".tvaprune-version").write_text("0.0.1\n")
    said = run(*dvc, cwd=pipeline, code=255)
    assert "error: this pipeline is of tvaprune 0.0.1, but" in said
    assert "Traceback" not in said
    run("tvaprune", "init", "--renew", ".", cwd=pipeline)
    assert stages_run(run(*dvc, cwd=pipeline)) == set()
