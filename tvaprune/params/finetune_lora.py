"""Parameters of the stage finetune_lora."""

from dataclasses import fields
from typing import Any, ClassVar

from pydantic import Field

from tvaprune.options.recovery import RecoveryOptions
from tvaprune.params.loading import StageParams


class FinetuneLoraParams(StageParams, RecoveryOptions):  # type: ignore[misc]  # frozen, which mypy cannot see
    """Every field of `RecoveryOptions` is a key of the section; pydantic reads a dataclass's fields as a model's."""

    section: ClassVar[str] = "finetune_lora"
    shared: ClassVar[tuple[str, ...]] = ("seed",)

    enabled: bool = Field(description="false: skip recovery; the outputs say so and hold no weights.")

    @property
    def options(self) -> RecoveryOptions:
        """The options alone, as the core takes them."""
        return RecoveryOptions(**{field.name: getattr(self, field.name) for field in fields(RecoveryOptions)})

    def used(self) -> dict[str, Any]:
        """Without what costs memory or time alone, and the options of a distillation that is not in use."""
        idle = {"enabled", "gradient_checkpointing", "save_every"}
        if self.teacher == "none":
            idle |= {"distillation", "distillation_weight", "temperature", "top_k"}
        elif self.distillation == "mse":
            idle |= {"temperature"}
        return {self.section: self.model_dump(mode="json", exclude=idle)}
