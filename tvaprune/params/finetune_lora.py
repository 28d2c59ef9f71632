"""Parameters of the stage finetune_lora."""

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from tvaprune.params.loading import StageParams

Settings = TypeVar("Settings")
Name = Annotated[str, Field(min_length=1)]


class FinetuneLoraParams(StageParams):
    """LoRA on the compact model, distilled from the dense one."""

    section: ClassVar[str] = "finetune_lora"
    shared: ClassVar[tuple[str, ...]] = ("seed",)

    seed: int = Field(ge=0, lt=2**31, description="Adapter initialisation, order of the windows, dropout.")
    enabled: bool = Field(description="false: skip recovery; the outputs say so and hold no weights.")

    rank: int = Field(ge=1, description="LoRA rank r.")
    alpha: float = Field(gt=0, description="The adapter is scaled by alpha / rank.")
    dropout: float = Field(ge=0, lt=1, description="On the adapter's input.")
    targets: Literal["all-linear"] | list[Name] = Field(
        description="all-linear (lm_head excepted), or a list of module names such as [q_proj, v_proj]."
    )
    use_dora: bool = Field(description="PEFT's weight-decomposed LoRA.")
    use_rslora: bool = Field(description="PEFT's rank-stabilised scale, alpha / sqrt(rank).")

    teacher: Literal["online", "cached", "none"] = Field(
        description="Dense model run beside the student, once before training (hidden states on disk), or not at all."
    )
    distillation: Literal["kl", "mse"] = Field(description="KL of softened probabilities, or MSE of logits.")
    distillation_weight: float = Field(ge=0, description="Weight of the distillation term.")
    ce_weight: float = Field(ge=0, description="Weight of the cross-entropy with the text.")
    temperature: float = Field(gt=0, description="Softens both distributions in kl; the term is scaled by its square.")
    top_k: int | None = Field(ge=1, description="Teacher's likeliest tokens compared one by one; null: all.")

    learning_rate: float = Field(gt=0, description="AdamW's peak.")
    weight_decay: float = Field(ge=0, description="AdamW's, on the adapter.")
    warmup: float = Field(ge=0, lt=1, description="Share of the steps with a linear rise.")
    decay: Literal["cosine", "linear"] = Field(description="From the peak to 0.")
    gradient_clip: float = Field(gt=0, description="Largest norm of the gradient.")
    batch_size: int = Field(ge=1, description="Windows a forward pass.")
    accumulation: int = Field(ge=1, description="Forward passes an optimizer step.")
    steps: int | None = Field(ge=1, description="Optimizer steps; null: as many as `epochs` takes.")
    epochs: float | None = Field(gt=0, description="Passes over the fine-tuning windows; null: `steps` decides.")
    gradient_checkpointing: bool = Field(description="Recompute activations in the backward pass to save memory.")
    validate_every: int = Field(ge=1, description="Steps between measurements on the validation windows.")
    save_every: int = Field(ge=1, description="Steps between saved states to go on from after a kill.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs}: set exactly one, the other null")
        if self.targets == [] or "lm_head" in self.targets:
            raise ValueError(f"targets = {self.targets}: name at least one module, and not lm_head")
        distilled = self.distillation_weight if self.teacher != "none" else 0
        if self.ce_weight + distilled == 0:
            raise ValueError(
                f"ce_weight = {self.ce_weight}, distillation_weight = {self.distillation_weight}, "
                f"teacher = {self.teacher}: nothing to train on; give ce_weight, or a teacher and its weight"
            )
        return self

    def used(self) -> dict[str, Any]:
        """Without what costs memory or time alone, and the options of a distillation that is not in use."""
        idle = {"enabled", "gradient_checkpointing", "save_every"}
        if self.teacher == "none":
            idle |= {"distillation", "distillation_weight", "temperature", "top_k"}
        elif self.distillation == "mse":
            idle |= {"temperature"}
        return {self.section: self.model_dump(mode="json", exclude=idle)}

    def take(self, kind: type[Settings]) -> Settings:
        """One of the core's groups of settings (a dataclass), from the parameters of the same names."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})  # type: ignore[arg-type]
