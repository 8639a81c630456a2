"""What every process needs that tests fork: imported, and looked up for the first time, once before it is forked.

Without this each of them spends most of its time on what transformers and PEFT do at the first model of a process.
Nothing is computed here, and no thread is left: neither would outlive a fork.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
from pathlib import Path

import tiny
import torch

from onward.config import Config
from onward.training.model.load import build_model
from onward.training.model.spec import ModelSpec
from onward.training.state import TrainState

torch.set_num_threads(1)  # threads of a pool would not outlive a fork, and whoever waits for one would hang
for name in (
    "peft.utils.transformers_weight_conversion",
    "transformers.training_args",
    "transformers.trainer_callback",
):
    importlib.import_module(name)

with tempfile.TemporaryDirectory() as folder:
    config = Config.model_validate({"model": folder, "lora": {"rank": 2}})
    spec = ModelSpec(config, tiny.save_tiny_model(Path(folder)), torch.device("cpu"), torch.float32)
    TrainState.start(build_model(spec), config)

gc.collect()
gc.freeze()  # a collection in a forked process would touch, and so copy, all of this
