"""Parameters of the fetch_inputs stage."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from tvaprune.inputs.sources import LocalSource, ModelSource, Record, TaskSource, TextSource
from tvaprune.params.loading import StageParams

_KINDS = ("package", "hub", "local")


class Texts(Record):
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

    def local_paths(self) -> dict[str, Path]:
        """The path of every local source, by its key in the section."""
        sources: dict[str, Any] = {"model": self.model, "zeroshot": self.zeroshot}
        for name, texts in (("calibration", self.calibration), ("heldout", self.heldout)):
            sources |= {f"{name}.sources.{index}": source for index, source in enumerate(texts.sources)}
        return {name: source.path for name, source in sources.items() if isinstance(source, LocalSource)}

    @classmethod
    def _describe(cls, problem: Any) -> str:
        """Without the kind of source in a key's name, and without a whole source as the offending value."""
        location = tuple(part for part in problem["loc"] if part not in _KINDS)
        name = ".".join(str(part) for part in (cls.section, *location))
        if problem["type"] == "secret":
            return f"{name}.{problem['msg']}"
        if problem["type"] == "unknown_key":
            return f"{name}: {problem['msg']}"
        if problem["type"].startswith("union_tag"):
            kind = problem["input"].get("source") if isinstance(problem["input"], dict) else problem["input"]
            return f"{name}.source = {kind!r}: use {', '.join(_KINDS)}"
        return super()._describe({**problem, "loc": location})
