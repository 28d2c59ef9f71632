"""Values that a parameter and the core both name."""

from typing import Annotated, Literal

from pydantic import Field

# compact.layout: each layer as wide as its mask; every layer alike; uneven, padded with zeros to the widest layer.
Layout = Literal["uneven", "uniform", "padded"]
# adapt_dimensions.rounding: each width to its nearest multiple, or all within the parameter budget.
Rounding = Literal["nearest", "budget"]
# Which latency counts: that of a phase, or of a request: one prefill and profile_hardware.decode_tokens steps.
Latency = Literal["prefill", "decode", "request"]
# update_weights.method: fold the gates' means into the weights, or nothing.
Fold = Literal["mean", "none"]
# Label of a held-out text -> windows of it.
WindowCounts = dict[str, Annotated[int, Field(ge=2)]]
