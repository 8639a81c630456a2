"""The model of a run: full, LoRA or quantized LoRA are choices made here, and nowhere else."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onward.config import Config
from onward.errors import ModelError
from onward.training.attention import ROW_ATTENTION, is_padding_free
from onward.training.fused_lora import fuse_lora
from onward.training.quiet import quiet
from onward.training.seeds import fold, seeded

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it needs code from the folder.
    """
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(error)}", where=folder, hint="onward doctor looks closer."
        ) from None


def build_model(
    config: Config, base: Path, device: torch.device, dtype: torch.dtype, *, checkpoint: Path | None = None
) -> nn.Module:
    """Build the model of a run in training mode, with trained weights in float32.

    Args:
        base: folder of the base model.
        checkpoint: folder to take trained weights (and the adapter's config) from; None starts a new run, whose
            adapter is a function of the seed.

    Raises:
        ModelError: the base cannot be loaded, or the method does not fit this machine or model.
    """
    if config.method == "full":
        model = _load(checkpoint or base, torch.float32, {})
        with _in_memory(model, device):
            return cast(nn.Module, model).train()
    base_model = _load(base, dtype, _quantization(config, dtype, device))
    base_model.requires_grad_(False)
    weights = contextlib.nullcontext() if config.method == "qlora" else _in_memory(base_model, device)
    with weights, quiet(), seeded(fold(config.seed, "adapter"), device):
        model = _wrap(base_model, _adapter_config(config, base, checkpoint))
        if checkpoint is not None:
            load_adapter(model, checkpoint)
    if dtype == torch.float32:
        fuse_lora(model)
    return model.to(device).train() if config.method != "qlora" else model.train()


def _load(folder: Path, dtype: torch.dtype, extra: dict[str, Any]) -> PreTrainedModel:
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **extra
            )
    except Exception as error:
        raise ModelError(
            f"the model cannot be loaded: {_first_line(error)}", where=folder, hint="onward doctor looks closer."
        ) from None
    model.config.use_cache = False
    if is_padding_free(model.config.model_type):
        model.set_attn_implementation(ROW_ATTENTION)
    return model


@contextlib.contextmanager
def _in_memory(model: nn.Module, device: torch.device) -> Generator[None]:
    """Bring weights from the mapped file to the device; the body may do all but compute with them.

    Also on a CPU: kernels may give other last bits for other memory alignments. There the copy goes on behind the body.
    """
    if device.type != "cpu":
        model.to(device)
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    mapped = [tensor.detach() for tensor in tensors]
    own = [torch.empty_like(tensor) for tensor in mapped]
    with ThreadPoolExecutor(1, thread_name_prefix="onward-weights") as thread:
        copied = thread.submit(cast(Any, torch)._foreach_copy_, own, mapped)
        yield
        copied.result()
    for tensor, data in zip(tensors, own, strict=True):
        tensor.data = data


def _quantization(config: Config, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    if config.method != "qlora":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("method qlora needs bitsandbytes", where="method", hint='pip install "onward[qlora]"')
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _adapter_config(config: Config, base: Path, checkpoint: Path | None) -> PeftConfig:
    if checkpoint is not None:
        adapter = PeftConfig.from_pretrained(str(checkpoint))
        adapter.inference_mode = False
        if isinstance(adapter, LoraConfig):
            adapter.lora_dropout = config.lora.dropout
        return adapter
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=cast(int, config.lora.alpha),
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )


def _wrap(model: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    try:
        return cast(PeftModel, get_peft_model(model, adapter))
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ModelError(
            f"the adapter does not fit: {_first_line(error)}",
            where="lora.targets",
            hint=f"Linear layers of this model: {', '.join(names)}; or all-linear.",
        ) from None


def set_dropout(model: nn.Module, probability: float) -> None:
    """Put another adapter dropout in force (the key may change at a boundary)."""
    if isinstance(model, PeftModel):
        cast(Any, model.peft_config["default"]).lora_dropout = probability
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("lora_dropout.default"):
                parent = model.get_submodule(name.rpartition(".")[0])
                cast(Any, parent)["default"] = nn.Dropout(probability) if probability else nn.Identity()


def save_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write trained weights as Hugging Face files: an adapter with its config, or a whole model.

    Args:
        model: gives names, config and what is not trained.
        weights: the trained weights by the names of `model`'s parameters.
    """
    if not isinstance(model, PeftModel):
        own = {id(parameter): weights[name] for name, parameter in model.named_parameters() if name in weights}
        tensors = {name: own.get(id(value), value) for name, value in model.state_dict(keep_vars=True).items()}
        with quiet():
            cast(PreTrainedModel, model).save_pretrained(folder, state_dict=tensors)
        return
    tensors = get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner alone
    values = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    text = json.dumps(values, indent=2, sort_keys=True, default=sorted)  # a set's own order differs between processes
    (folder / ADAPTER_CONFIG).write_text(text + "\n")


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load an adapter's weights into the model that was built from its config.

    Raises:
        ModelError: names or shapes do not fit.
    """
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(set(tensors) ^ set(expected)) or sorted(n for n in expected if expected[n].shape != tensors[n].shape)
    if wrong:
        raise ModelError(f"the adapter's weights do not fit its config: {', '.join(wrong[:3])}", where=folder)
    set_peft_model_state_dict(model, tensors)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model, without the adapter's wrapper around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model can be asked for the logits of some positions only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(cast(Any, model).forward).parameters


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
