"""Loads models: to train (full, LoRA and quantized LoRA are distinguished only here) or for inference."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import inspect
import re
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onward.atomic import system_errors
from onward.config import Config
from onward.errors import ConfigError, ModelError, Unreadable, first_line
from onward.training.device.errors import is_of_the_device
from onward.training.layers.attention import PADDING_FREE, lay_end_to_end
from onward.training.layers.decoder_parts import fuse_parts, kernels_work
from onward.training.layers.experts import let_experts_repeat
from onward.training.layers.fused_lora import ADAPTER, fuse_lora
from onward.training.layers.token_rows import keep_places
from onward.training.model.adapter import add_adapter, load_adapter, saved_adapter_config, train_in_float32
from onward.training.model.adapter_shape import new_adapter_config, require_effect
from onward.training.model.base import ADAPTER_CONFIG, COMPLETE
from onward.training.model.completeness import require_all_weights, require_no_others
from onward.training.model.expert_lora import wrap_experts
from onward.training.model.quiet import one_load, quiet
from onward.training.model.spec import ModelSpec
from onward.training.model.treatment import Treatment
from onward.training.seeds import fold, seeded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it needs code from the folder.
        Unreadable: one of its files cannot be read now.
    """
    try:
        with quiet(), system_errors(folder):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if is_of_the_device(error):
            raise
        _require_readable(error, folder)
        raise ModelError(f"the tokenizer cannot be loaded: {first_line(error)}", where=folder, hint=COMPLETE) from None


def build_model(
    spec: ModelSpec,
    *,
    checkpoint: Path | None = None,
    treatment: Treatment | None = None,
    adapter: PeftConfig | None = None,
    mapped: bool = False,
) -> nn.Module:
    """Build the model of a run in training mode, with trained weights in float32.

    Args:
        checkpoint: folder to take trained weights (and the adapter's config) from; None starts a new run, whose
            adapter is a function of the seed.
        treatment: what the model's admission found; None for a run made before there was one.
        adapter: the adapter of a model whose trained weights come from elsewhere.
        mapped: leave weights in their files, on the CPU and in their type there, for a model that will be sharded.

    Raises:
        ModelError: the base cannot be loaded, or the method does not fit this machine or model.
        Unreadable: a file of the model cannot be read now.
    """
    left_out = () if treatment is None else treatment.left_out
    model = build_plain(spec, checkpoint=checkpoint, left_out=left_out, adapter=adapter, mapped=mapped)
    was_listed = causal_lm(model).config.model_type in PADDING_FREE
    make_fast(model, spec.device, end_to_end=was_listed if treatment is None else treatment.end_to_end)
    return model


def build_plain(
    spec: ModelSpec,
    *,
    checkpoint: Path | None = None,
    left_out: tuple[str, ...] = (),
    strict: bool = False,
    adapter: PeftConfig | None = None,
    mapped: bool = False,
) -> nn.Module:
    """Build the model of a run as plain transformers and PEFT compute it; arguments as for `build_model`.

    Args:
        left_out: what is not trained: modules that get no adapter, or weights in full training.
        strict: refuse files with weights that the model has no place for.
    """
    config, base, device, dtype = spec.config, spec.base, spec.device, spec.dtype
    if config.method == "full":
        kind = None if mapped else torch.float32
        whole = _for_training(_load(checkpoint or base, kind, strict=strict), spec)
        with contextlib.nullcontext() if mapped else _in_memory(whole, device):
            train_only(whole, config.train, left_out)
            return cast(nn.Module, whole).train()
    base_model = _for_training(_load(base, dtype, strict=strict, **_quantization(config, dtype, device)), spec)
    base_model.requires_grad_(False)
    _keep_quantized(base_model)
    stays = mapped or config.method == "qlora"
    weights = contextlib.nullcontext() if stays else _in_memory(base_model, device)
    with weights, quiet(), seeded(fold(config.seed, "adapter"), device):
        if adapter is not None:
            model = add_adapter(base_model, adapter)
        elif checkpoint is None:
            model = add_adapter(base_model, new_adapter_config(config, base, base_model, left_out))
            require_effect(model, config)
        else:
            model = add_adapter(base_model, saved_adapter_config(checkpoint, dropout=config.lora.dropout))
    train_in_float32(model)
    if checkpoint is not None:  # only now: biases of the base may be trained too, and their memory has changed
        load_adapter(model, checkpoint)
    wrap_experts(model)
    return model.train() if stays else model.to(device).train()


def train_only(model: nn.Module, patterns: Sequence[str], left_out: Collection[str]) -> None:
    """Freeze every weight whose name matches no pattern; without patterns, all are trained.

    Args:
        left_out: names of weights that are frozen in any case.

    Raises:
        ConfigError: a pattern matches no name.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied weights have two names
        names.setdefault(parameter, []).append(name)
    for pattern in patterns:
        if not any(re.search(pattern, name) for own in names.values() for name in own):
            kinds = sorted({re.sub(r"\.\d+\.", ".0.", name) for own in names.values() for name in own})
            hint = f"Names are, for instance: {', '.join(kinds[:12])}."
            raise ConfigError(f"train: {pattern!r} matches no weight's name", where="train", hint=hint)
    for parameter, own in names.items():
        asked = not patterns or any(re.search(pattern, name) for pattern in patterns for name in own)
        parameter.requires_grad_(asked and not any(name in left_out for name in own))


def make_fast(model: nn.Module, device: torch.device, *, end_to_end: bool) -> None:
    """Make a plain model compute the same faster: rows end to end, an adapter's layers in one node, kernels on a GPU.

    Args:
        device: the device that computes its steps.

    Raises:
        ValueError: rows cannot be laid end to end for it.
    """
    if end_to_end:
        lay_end_to_end(causal_lm(model))
    if kernels_work(device):
        fuse_parts(model)
    if isinstance(model, PeftModel):
        fuse_lora(model)
        keep_places(model)


def load_model(folder: Path, base: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load the model of a checkpoint for inference: frozen, in evaluation mode, without an optimizer.

    Args:
        folder: a checkpoint, a restore point or `current_model/`, with an adapter or a full model.
        base: folder of the base model, for an adapter; it is loaded as it is, even if training quantizes it.
        dtype: type of all weights.

    Raises:
        ModelError: base or weights cannot be loaded.
        Unreadable: a file of the model cannot be read now.
    """
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    model = _load(base if has_adapter else folder, dtype)
    with _in_memory(model, device):
        model.requires_grad_(False).eval()
    if not has_adapter:
        return model
    with quiet(), seeded(0, device):
        adapted = add_adapter(model, saved_adapter_config(folder, dropout=0.0))
        load_adapter(adapted, folder)
    wrap_experts(adapted)
    return adapted.to(device=device, dtype=dtype).requires_grad_(False).eval()


def fits_shape(model: nn.Module, folder: Path) -> bool:
    """Return whether `exchange_adapter` can put the adapter in a folder into a model that `load_model` loaded."""
    if not isinstance(model, PeftModel) or not (folder / ADAPTER_CONFIG).is_file():
        return False
    shape: Any = saved_adapter_config(folder)
    return getattr(shape, "bias", "none") == "none" and _plain(shape) == _plain(model.peft_config[ADAPTER])


def exchange_adapter(model: nn.Module, folder: Path) -> None:
    """Give a model that `load_model` loaded the weights of another adapter that `fits_shape` accepts; the base stays.

    Raises:
        ModelError: the adapter's weights are damaged; the model still has its own.
        Unreadable: they cannot be read now.
    """
    adapted = cast(PeftModel, model)
    adapted.set_adapter(ADAPTER)  # marks what belongs to the adapter, which identifies its weights
    try:
        load_adapter(adapted, folder)
    finally:
        adapted.requires_grad_(False)


def _plain(adapter: PeftConfig) -> dict[str, Any]:
    """Return what decides the shape of an adapter, without how it is used or where it came from."""
    values = adapter.to_dict()
    return {key: value for key, value in values.items() if key not in ("inference_mode", "lora_dropout")}


def load_base(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load a base model as it is, by default in the type of its files.

    Raises:
        ModelError: it cannot be loaded.
        Unreadable: one of its files cannot be read now.
    """
    return _load(folder, dtype)


def _way_out(error: Exception) -> str:
    """Return what to do about a model that transformers fails to load."""
    if isinstance(error, SafetensorError | OSError):
        return "One of its files is missing or incomplete: copy or download the whole folder again."
    if "does not recognize this architecture" in str(error):
        known = f"The installed transformers is {transformers.__version__}"
        return f"{known}; a later one may support it. Otherwise choose another model: --model NAME_OR_PATH"
    return "onward doctor looks closer."


def _require_readable(error: Exception, folder: Path) -> None:
    """Tell a file that the system does not let this user read, or not now, from one that is missing or damaged.

    Raises:
        Unreadable: it does not.
    """
    if isinstance(error, OSError) and error.errno is None:  # safetensors calls any file that it cannot open missing
        for path in sorted(folder.glob("*.safetensors")):
            try:
                path.open("rb").close()
            except OSError as refused:
                error = refused
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
        raise Unreadable.of(error, error.filename or folder) from None


def _load(folder: Path, dtype: torch.dtype | None, *, strict: bool = False, **extra: Any) -> PreTrainedModel:
    try:
        with one_load, quiet(), system_errors(folder):
            found: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **extra,
            )  # fmt: skip
    except Exception as error:
        if is_of_the_device(error):
            raise
        _require_readable(error, folder)
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                "transformers has no causal language model of this kind",
                where=folder,
                hint="It is part of a larger model, or not a text model. Choose another: --model NAME_OR_PATH",
            ) from None
        raise ModelError(
            f"the model cannot be loaded: {first_line(error)}", where=folder, hint=_way_out(error)
        ) from None
    model, loaded = found
    require_all_weights(loaded, folder)
    if strict:
        require_no_others(loaded, folder)
    return model


def _for_training(model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    model.config.use_cache = False
    if spec.config.deterministic:
        let_experts_repeat(model, spec.device)
    return model


@contextlib.contextmanager
def _in_memory(model: nn.Module, device: torch.device) -> Generator[None]:
    """Move weights from the mapped file to the device; the body may do anything except compute with them.

    This is done on a CPU too, where kernels may give other last bits for other alignments; the copy then runs during
    the body.
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


def _keep_quantized(model: nn.Module) -> None:
    """Make 4-bit layers compute from the unpacked weights, in evaluation as in training.

    On a CPU with AVX512-BF16, bitsandbytes packs a layer's weight in place at its first forward pass in evaluation
    mode, such as the probe's; from then on training also computes in bfloat16, and a resumed run gives other bits.
    """
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            cast(Any, part).support_avx512bf16_for_cpu = False


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model, without the adapter's wrapper around it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def keeps_logits(model: PreTrainedModel) -> bool:
    """Return whether the model can compute the logits of some positions only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(cast(Any, model).forward).parameters
