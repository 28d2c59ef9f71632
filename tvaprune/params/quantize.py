"""Parameters of the quantize stage."""

from dataclasses import fields
from typing import ClassVar

from pydantic import Field

from tvaprune.options.quantize import QuantizeOptions
from tvaprune.params.loading import StageParams


class QuantizeParams(StageParams, QuantizeOptions):  # type: ignore[misc]  # frozen, which mypy cannot see
    """Every field of `QuantizeOptions` is a key of the section."""

    section: ClassVar[str] = "quantize"

    enabled: bool = Field(description="false: skip; the outputs say so and hold no files.")

    @property
    def options(self) -> QuantizeOptions:
        return QuantizeOptions(**{field.name: getattr(self, field.name) for field in fields(QuantizeOptions)})
