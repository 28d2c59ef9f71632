"""Parameters of the update_weights stage."""

from typing import Literal

from pydantic import Field

from tvaprune.params.loading import StageParams


class UpdateWeightsParams(StageParams):
    section = "update_weights"

    method: Literal["mean", "none"] = Field(description="Fold the gates' means into the weights, or nothing.")
