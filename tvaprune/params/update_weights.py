"""Parameters of the update_weights stage."""

from pydantic import Field

from tvaprune.options.choices import Fold
from tvaprune.params.loading import StageParams


class UpdateWeightsParams(StageParams):
    section = "update_weights"

    method: Fold = Field(description="Fold the gates' means into the weights, or nothing.")
