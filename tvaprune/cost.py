"""Memory that the process or the device has used."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: resident set of the process, or allocated memory of a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
