"""Parameters of the report stage."""

from typing import Annotated

from pydantic import Field

from tvaprune.params.loading import StageParams


class ReportParams(StageParams):
    section = "report"

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        description="texts that every model continues, side by side; [] = load no model"
    )
    tokens: int = Field(ge=1, description="tokens that a model adds to a prompt, at most")
