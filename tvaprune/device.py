"""The device and dtype to compute in: chosen by the environment, never by a stage's command."""

import ctypes
import os
import sys

import torch

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device() -> torch.device:
    """CUDA if available (each process its own device), else CPU; TVAPRUNE_DEVICE overrides."""
    name = os.environ.get("TVAPRUNE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"TVAPRUNE_DEVICE={name!r}: not a device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"TVAPRUNE_DEVICE={name!r}: this machine has no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "TVAPRUNE_NPROC must be no larger, and TVAPRUNE_DEVICE one of them"
        )
    return device


def pick_dtype(device: torch.device, asked: str = "auto") -> torch.dtype:
    """The dtype `asked` for; for auto TVAPRUNE_DTYPE, or bfloat16 where the device multiplies it, or float32."""
    name = os.environ.get("TVAPRUNE_DTYPE") if asked == "auto" else asked
    if name:
        if name not in DTYPES:
            raise ValueError(f"TVAPRUNE_DTYPE={name!r}: use one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def require_trainable(dtype: torch.dtype) -> None:
    """Raise ValueError for float16, whose gradients underflow without a scaled loss, which nothing here has."""
    if dtype == torch.float16:
        raise ValueError(
            "the model computes in float16, in which gradients underflow; set TVAPRUNE_DTYPE to bfloat16 or float32, "
            "or in Python load the model in one of these"
        )


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its queued work, so that times include it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> bool:
    """Make glibc reuse large freed blocks instead of returning them to the system; False where there is no glibc.

    A loss over a large vocabulary allocates and frees tens of megabytes repeatedly. By default the system zeroes them
    page by page each time: 5% of a training step on two cores.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
