"""Read a stage's parameters from params.yaml; refuse unknown, missing and wrong ones."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tvaprune.options.secrets import without_secrets


class ParameterError(ValueError):
    """A parameter is missing, unknown, of the wrong type or out of range."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping. ruamel, because DVC writes 1e-05, which YAML 1.1 reads as text."""
    try:
        content = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise ParameterError(f"{path}: no such file; run from the repository root") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise ParameterError(f"{where}: not valid YAML: {' '.join(str(what).split())}") from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: expected a mapping of parameters, found {type(content).__name__}")
    return content


class StageParams(BaseModel):
    """The parameters of one stage: its own section, and the keys in `shared`.

    A shared key is a top-level key (`seed`) or a key of another section (`compact.layout`, the field `layout` here).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    section: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check the section. Raises ParameterError, which names every wrong key, its value and the rule."""
        return cls.of(read_yaml(path), path)

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> Self:
        """The same from the content of params.yaml; `path` is for the messages."""
        if not isinstance(content.get(cls.section), dict):
            raise ParameterError(f"{path}: section {cls.section!r} is missing or is not a mapping")
        merged = dict(content[cls.section])
        for key in cls.shared:
            section, _, name = key.rpartition(".")
            if name in merged:
                where = f"a key of section {section}" if section else "a top-level key"
                raise ParameterError(f"{path}: {cls.section}.{name}: {name} is {where}, set it there")
            keys = content.get(section) if section else content
            if not isinstance(keys, dict):
                raise ParameterError(f"{path}: section {section!r} is missing or is not a mapping")
            if name not in keys:
                raise ParameterError(f"{path}: {'' if section else 'top-level '}key {key!r} is missing")
            merged[name] = keys[name]
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            problems = [cls._describe(problem) for problem in error.errors()]
            raise ParameterError(without_secrets(f"{path}: " + "; ".join(problems))) from None

    def used(self) -> dict[str, Any]:
        """The parameters that affect the result, by section: the `made_with` of an artifact."""
        return {self.section: self.model_dump(mode="json")}

    @classmethod
    def declared(cls) -> list[str]:
        """The stage's `params:` in dvc.yaml."""
        return [cls.section, *cls.shared]

    @classmethod
    def _describe(cls, problem: Any) -> str:
        location = ".".join(str(part) for part in problem["loc"])
        shared = {key.rpartition(".")[2]: key for key in cls.shared}
        name = shared.get(location, f"{cls.section}.{location}".rstrip("."))
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            owner: Any = cls if len(problem["loc"]) == 1 else cls.model_fields[str(problem["loc"][0])].annotation
            options = [each.name for each in fields(owner)] if is_dataclass(owner) else []
            known = getattr(owner, "model_fields", None) or options
            return f"{name}: unknown key; known keys are {', '.join(sorted(set(known) - set(shared)))}"
        if problem["type"] == "missing":
            return f"{name}: missing"
        message = problem["msg"].removeprefix("Value error, ")
        # A rule between several keys names them itself; the section's other keys would hide them.
        between = problem["type"] == "value_error" and isinstance(problem["input"], dict)
        return f"{name}: {message}" if between else f"{name} = {problem['input']!r}: {message}"
