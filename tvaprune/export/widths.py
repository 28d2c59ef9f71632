"""What quantised types need before any work starts: packages, and widths that hold whole groups of weights."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import lcm

from transformers import PreTrainedConfig

from tvaprune.architecture.topology import LayerWidths, Topology
from tvaprune.errors import MissingPackageError
from tvaprune.options.quantize import GROUPS, TORCHAO, FileType


def check_types(types: Sequence[FileType]) -> None:
    """Raise a MissingPackageError where a package that writes or runs a type is not installed."""
    if set(types) & set(TORCHAO) and find_spec("torchao") is None:
        raise MissingPackageError("int8_wo needs torchao: pip install torchao")
    if set(types) - set(TORCHAO) and find_spec("xllamacpp") is None:
        raise MissingPackageError("GGUF types need llama.cpp: pip install xllamacpp")


def check_group_multiples(types: Sequence[FileType], multiples: Mapping[str, int]) -> None:
    """Raise ValueError where widths of these multiples, by pruned axis, may not hold whole groups of a type.

    The message says to what `adapt_dimensions.multiple` must be raised.
    """
    for kind in types:
        for axis, multiple in multiples.items():
            if multiple % GROUPS[kind]:
                raise ValueError(
                    f"adapt_dimensions.multiple.{axis} = {multiple}: {kind} in quantize.types needs widths that are "
                    f"multiples of {GROUPS[kind]}; raise it to {lcm(multiple, GROUPS[kind])}"
                )


def check_group_heads(types: Sequence[FileType], query_rows: int) -> None:
    """Raise ValueError where pruned heads, each of so many query rows, may not hold whole groups of a type."""
    for kind in types:
        if query_rows % GROUPS[kind]:
            raise ValueError(
                f"quantize.types: {kind} needs widths that are multiples of {GROUPS[kind]}, and a key-value head of "
                f"this model has {query_rows} rows of queries; leave {kind} out, or kv_heads out of learn_masks.axes"
            )


def check_widths(name: str, config: PreTrainedConfig, types: Sequence[FileType]) -> None:
    """Raise ValueError for the first width of a model that does not hold whole groups of a type; names the layer.

    `name` is the model's in the metrics; no parameter changes the widths of "dense".
    """
    topology = Topology.of(config)
    hidden, intermediate, kv_heads = LayerWidths.of_config(config)
    widths = [("hidden", "the hidden width", hidden)]
    for layer, (units, heads) in enumerate(zip(intermediate, kv_heads, strict=True)):
        widths.append(("intermediate", f"layer {layer}: the MLP width", units))
        widths.append(("", f"layer {layer}: the width of the heads", heads * topology.query_rows))
    for kind in types:
        for axis, where, width in widths:
            if width % GROUPS[kind]:
                raised = f"raise adapt_dimensions.multiple.{axis} to {GROUPS[kind]}"
                advice = raised if axis and name != "dense" else f"leave {kind} out"
                raise ValueError(
                    f"{name}: {where} is {width}, and {kind} in quantize.types needs multiples of {GROUPS[kind]}; "
                    f"{advice}"
                )
