"""What the stages that run lm-eval set up: no network, and none of its messages. Imported before what reads these."""

import logging
import os
from pathlib import Path
from typing import Any

# Read once, when the hub's client is first imported. Everything is on disk, so nothing may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
from transformers import AutoTokenizer


def quiet_tokenizer(dense: Path) -> Any:
    """The dense model's tokenizer; lm-eval is quiet from here on."""
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a ready-made model, which is meant
    return AutoTokenizer.from_pretrained(dense)
