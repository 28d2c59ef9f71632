"""Options of the loss that compares a model with the text and with its teacher."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """loss = ce_weight · CE + distillation_weight · D; `tvaprune.losses.distillation_loss` defines both terms.

    Construction raises pydantic's ValidationError (a ValueError) for a value that is out of range.
    """

    distillation: Literal["kl", "mse"] = Field(description="D: KL of softened probabilities, or MSE of logits.")
    distillation_weight: float = Field(ge=0, description="Weight of the distillation term.")
    ce_weight: float = Field(ge=0, description="Weight of the cross-entropy with the text.")
    temperature: float = Field(gt=0, description="Softens both distributions in kl; the term is scaled by its square.")
    top_k: int | None = Field(ge=1, description="Teacher's likeliest tokens compared one by one; null: all.")
