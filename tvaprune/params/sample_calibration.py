"""Parameters of the sample_calibration stage."""

from typing import Annotated, ClassVar

from pydantic import Field

from tvaprune.options.inputs import Packing
from tvaprune.params.loading import StageParams

Weights = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class SampleCalibrationParams(StageParams):
    section = "sample_calibration"
    shared: ClassVar[tuple[str, ...]] = ("seed",)

    seed: int = Field(description="Seed of the choice of documents and windows.", ge=0)
    samples: int = Field(description="Windows to learn masks on.", ge=1)
    seq_len: int = Field(description="Tokens in each of these windows, and in the validation windows.", ge=2)
    validation_samples: int = Field(description="Windows to validate masks on.", ge=1)
    finetune_samples: int = Field(description="Windows to fine-tune on.", ge=1)
    finetune_seq_len: int = Field(description="Tokens in each of these windows, and in their validation windows.", ge=2)
    finetune_validation_samples: int = Field(description="Windows to validate fine-tuning on.", ge=1)
    packing: Packing = Field(description="documents: cut from long ones; packed: short ones in a row; auto: by length.")
    mix: Weights = Field(description="Source -> weight in shares of the windows to learn masks on; 1 if not listed.")
    finetune_mix: Weights | None = Field(description="The same for the windows to fine-tune on; null: as mix.")
