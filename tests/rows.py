"""Rows of random tokens, tiny random models of each type, and their losses and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from onward.data.plan.loader import Batch
from onward.data.tokenized import Row
from onward.training.steps.loss import TargetLoss

CPU = torch.device("cpu")
VOCABULARY = 60
WINDOWED = ("mistral", "starcoder2", "phi3")
"""Types that a test gives a sliding window."""


def batch(*lengths: int, seed: int = 0) -> Batch:
    """Return rows of these lengths with random tokens, every third of which is no target."""
    generator = np.random.default_rng(seed)
    rows = [
        Row(generator.integers(3, VOCABULARY, length), (np.arange(length) % 3 > 0) | (np.arange(length) == 1))
        for length in lengths
    ]
    return Batch(rows, list(range(len(rows))), list(range(len(rows))))


def tiny_model(model_type: str, attention: str, **settings: Any) -> nn.Module:
    """Return a random model of two layers; equal for equal settings."""
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def loss_and_gradients(model: nn.Module, rows: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradient of every trained parameter."""
    loss = TargetLoss(model, CPU, torch.float32)(rows)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), gradients
