"""Options of fine-tuning: LoRA on a compact model, distilled from the dense one."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from tvaprune.options.loss import LossOptions

# The linear modules of a decoder layer, alike in all families. lm_head stays frozen, because the loss uses its weight.
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions(LossOptions):
    """What the section finetune_lora of params.yaml sets, and the seed.

    As in `LossOptions`, construction raises ValidationError, also for options that contradict each other.
    """

    seed: int = Field(ge=0, lt=2**31, description="Seed of the adapter, of the order of windows and of dropout.")
    rank: int = Field(ge=1, description="LoRA rank r; may exceed a narrow layer's width.")
    alpha: float = Field(gt=0, description="The adapter is scaled by alpha / rank.")
    dropout: float = Field(ge=0, lt=1, description="On the adapter's input.")
    targets: str | list[str] = Field(
        description="all-linear (lm_head excepted), or a list of module names such as [q_proj, v_proj]."
    )
    use_dora: bool = Field(description="PEFT's weight-decomposed LoRA.")
    use_rslora: bool = Field(description="PEFT's rank-stabilised scale, alpha / sqrt(rank).")

    teacher: Literal["online", "cached", "none"] = Field(
        description="Dense model run beside the student, once before training (hidden states on disk), or not at all."
    )

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
    validate_every: int = Field(
        ge=1, description="Steps between measurements on the validation windows; the last step is always measured."
    )
    save_every: int = Field(ge=1, description="Steps between saved states to go on from after a kill.")

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.accumulation

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps = {self.steps} and epochs = {self.epochs}: set exactly one, the other null")
        names = self.targets if isinstance(self.targets, list) else []
        if self.targets != "all-linear" and (not names or set(names) - set(LINEAR_MODULES)):
            raise ValueError(
                f"targets = {self.targets!r}: give all-linear, or a list of some of {', '.join(LINEAR_MODULES)}"
            )
        distilled = self.distillation_weight if self.teacher != "none" else 0
        if self.ce_weight + distilled == 0:
            raise ValueError(
                f"ce_weight = {self.ce_weight}, distillation_weight = {self.distillation_weight}, "
                f"teacher = {self.teacher}: nothing to train on; give ce_weight, or a teacher and its weight"
            )
        return self
