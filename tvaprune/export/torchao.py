"""Write a model directory with int8 weights of torchao, in the Hugging Face format (https://github.com/pytorch/ao)."""

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from tvaprune.checkpoint.config import require_model


@torch.inference_mode()
def write_int8(
    directory: Path, out: Path, input_ids: Int[Tensor, "prompts tokens"]
) -> Float[Tensor, "prompts tokens vocab"]:
    """Write a model, stock or of the layout uneven, with its tokenizer.

    Returns the quantised model's logits, float32, as it is in memory.

    The decoder's matrices are int8 with a scale for each row; the embedding, the last matrix, norms and biases stay as
    they are. Two runs give the same bytes. Loading needs torchao, and of the layout uneven also trust_remote_code.

    Raises:
        FileNotFoundError: the directory holds no model.
    """
    require_model(directory)
    from torchao.quantization import Int8WeightOnlyConfig

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=False,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    ).eval()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(directory).save_pretrained(out)
    for file in sorted(out.glob("*.safetensors")):
        sort_metadata(file)
    return model(input_ids=input_ids, use_cache=False).logits.float()


def sort_metadata(file: Path) -> None:
    """Order the notes in a safetensors file's header by key: the library writes them in a random order."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(content) > length:
            raise ValueError(f"{file}: its header does not fit after sorting; update safetensors")
        stream.seek(8)
        stream.write(content.ljust(length))
