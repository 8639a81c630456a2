"""The proof that what was written loads back equal, by the rules of stock PEFT and transformers.

Both discard what they do not expect and make up what is missing; here either is an error. The stock library builds the
model anew from the files alone, without weights of the base, so that the proof costs little.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from onward.errors import VerificationFailed, first_line
from onward.training.device.errors import is_of_the_device
from onward.training.model.adapter import ADAPTER_WEIGHTS, add_adapter, saved_adapter_config
from onward.training.model.quiet import one_load, quiet

META = torch.device("meta")


def prove_roundtrip(
    model: nn.Module, folder: Path, weights: Mapping[str, torch.Tensor] | None = None, *, whole: bool = False
) -> None:
    """Prove that the files of a model in a folder give back the weights that were written.

    Args:
        model: the model that was written, for its structure and the weights that are not trained.
        folder: an adapter with its config, or a full model.
        weights: the trained weights as they were written; by default those that the model has now.
        whole: actually load a full model, even if a name in the file is not one of the model's (experts that
            transformers keeps as one tensor), which takes its memory once more.

    Raises:
        VerificationFailed: a weight is missing, unexpected, of another shape or of another value.
    """
    if weights is None:
        weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        with one_load, quiet():
            if isinstance(model, PeftModel):
                _require_equal(weights, _adapter_as_loaded(model, folder), folder)
                return
            every = _every(model, weights)
            if whole or not _names_match(every, folder):
                _require_equal(every, _model_as_loaded(folder), folder)
            else:
                _require_file(every, folder)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_of_the_device(error):
            raise
        raise _refusal(f"{type(error).__name__}: {first_line(error)}", folder) from None


def _adapter_as_loaded(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that PEFT loads into a model that it makes from the adapter's config, by parameter name."""
    config = copy.deepcopy(cast(PreTrainedModel, model.get_base_model()).config)
    with META:
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        made = add_adapter(bare, saved_adapter_config(folder))
    trained = _in_memory(made)
    result = cast(Any, set_peft_model_state_dict)(made, load_file(folder / ADAPTER_WEIGHTS))
    if result.unexpected_keys:
        raise _refusal(f"PEFT finds no place for {_some(result.unexpected_keys)}", folder)
    return trained


def _in_memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """Allocate memory, filled with NaN, for trained weights that are only shapes, and return them by name."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        own = cast(dict[str, nn.Parameter | None], vars(module)["_parameters"])
        for name, weight in own.items():
            if weight is not None and weight.requires_grad:
                filled = torch.full_like(weight, float("nan"), device="cpu")
                own[name] = made.setdefault(weight, nn.Parameter(filled))
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def _model_as_loaded(folder: Path) -> dict[str, torch.Tensor]:
    loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    _require_info(info, folder)
    return {name: weight.detach() for name, weight in loaded.named_parameters()}


def _names_match(weights: Mapping[str, torch.Tensor], folder: Path) -> bool:
    """Let transformers match the file's names and shapes with the model that it makes from the folder's config.

    Returns False if that says nothing: transformers 5.2 takes weights without memory for one tied weight as soon as one
    is missing, and fails with an AttributeError if one of them is a buffer.
    """
    try:
        made, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True,
            device_map="meta",
        )  # fmt: skip
    except AttributeError:
        return False
    _require_info(info, folder)
    return set(weights) == {name for name, _ in made.named_parameters()}


def _require_info(info: Mapping[str, Any], folder: Path) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise _refusal(f"transformers reports {kind.replace('_', ' ')}: {_some(info[kind])}", folder)


def _every(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weights.get(name, parameter.detach()) for name, parameter in model.named_parameters()}


def _require_file(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Compare every weight with the file's of the same name; others are compared if everything is loaded."""
    found = {name: tensor for name, tensor in _tensors(folder) if name in weights and not _equal(tensor, weights[name])}
    if found:
        raise _refusal(f"the file has a different {_some(found)}", folder)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with cast(Any, safe_open)(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def _require_equal(written: Mapping[str, torch.Tensor], loaded: Mapping[str, torch.Tensor], folder: Path) -> None:
    missing, unexpected = sorted(set(written) - set(loaded)), sorted(set(loaded) - set(written))
    if missing:
        raise _refusal(f"it contains nothing for {_some(missing)}", folder)
    if unexpected:
        raise _refusal(f"it also contains {_some(unexpected)}", folder)
    wrong = [name for name, weight in written.items() if not _equal(loaded[name], weight)]
    if wrong:
        raise _refusal(f"a different value comes back for {_some(wrong)}", folder)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*pair)


def _some(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _refusal(problem: str, folder: Path) -> VerificationFailed:
    return VerificationFailed(
        f"what was written does not load back: {problem}",
        where=folder,
        hint="None of it was committed. Leave out what cannot be saved: docs/config.md, lora; "
        "onward doctor looks closer.",
    )
