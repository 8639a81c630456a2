"""Finds which parts of a decoder can be computed in one node each (`decoder_nodes.py`): norms, gates and rotations.

What a model's modules compute is found by trial: a module gets other numbers or other parts and must give, to the last
bit, what the formula gives. Anything not understood stays as transformers has it. Only modules of the given model are
changed, no class and no function of transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]

from onward.errors import is_out_of_space
from onward.training.device.errors import is_of_the_device
from onward.training.layers.decoder_nodes import (
    FORMS,
    NormForm,
    gated,
    kernels_of,
    normed,
    plain_gate,
    plain_norm,
    plain_rotation,
    rotated,
)

ROTATE = "apply_rotary_pos_emb"
"""The name of the function by which transformers' attention rotates queries and keys."""
EPSILONS = ("variance_epsilon", "eps")
"""Names of the attribute that a norm adds to the mean square."""
TRIED = (torch.bfloat16, torch.float32)
"""Types in which modules are tried."""


def fuse_parts(model: nn.Module) -> None:
    """Compute those norms, gates and rotations of a model that are understood in one pass each."""
    understood: dict[tuple[type[nn.Module], float], NormForm | None] = {}
    gates: dict[object, bool] = {}
    rotations: dict[type[nn.Module], FunctionType | None] = {}
    for module in model.modules():
        kind, eps = type(module), _epsilon(module)
        if eps is not None:
            if (kind, eps) not in understood:
                understood[kind, eps] = form_of(module, eps)
            form = understood[kind, eps]
            if form is not None:
                module.forward = partial(normed, module, form, eps)
        elif _is_gated_once(module, gates):
            module.forward = partial(gated, module)
        else:
            if kind not in rotations:
                rotations[kind] = rotating(kind)
            rotates = rotations[kind]
            if rotates is not None:
                module.forward = MethodType(rotates, module)


def kernels_work(device: torch.device) -> bool:
    """Return whether these kernels work on a device."""
    return device.type == "cuda" and _try(device)


@cache
def _try(device: torch.device) -> bool:
    """Compute something small: Triton, or the compiler that it needs, may be missing.

    Raises:
        OSError: there is no room for what Triton compiles. Other kernels would compute other bits until there is.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    ones = torch.ones(2, 16, device=device, dtype=torch.bfloat16)
    try:
        return bool((kernels_of().gate(ones, ones) > 0).all())
    except Exception as error:  # if Triton fails here for any other reason, PyTorch's own kernels are used
        if is_of_the_device(error) or is_out_of_space(error):
            raise
        return False


def kernels_version(device: torch.device) -> str:
    """Return the version of Triton that compiles the kernels, for the record of the environment; "" if there are
    none."""
    if not kernels_work(device):
        return ""
    return f"triton {importlib.import_module('triton').__version__}"  # it comes in packages of several names


def _epsilon(module: nn.Module) -> float | None:
    """Return what a module adds to the mean square if it may be a norm, with one weight and nothing else, or None."""
    if dict(module.named_children()) or dict(module.named_buffers()):
        return None
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return None
    found = [value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)]
    return found[0] if len(found) == 1 else None


def form_of(module: nn.Module, eps: float) -> NormForm | None:
    """Return how a norm multiplies; None if it computes something else."""
    width = cast(torch.Tensor, module.weight).shape[0]
    return next((form for form in FORMS if all(_has_form(module, form, eps, width, kind) for kind in TRIED)), None)


def _has_form(module: nn.Module, form: NormForm, eps: float, width: int, dtype: torch.dtype) -> bool:
    x, weight = (_numbers(shape, dtype) for shape in ((3, 2, width), (width,)))
    try:
        with torch.no_grad():
            given = functional_call(module, {"weight": weight}, (x,))
    except Exception as error:  # a module of another kind may do anything
        if is_of_the_device(error):
            raise
        return False
    return isinstance(given, torch.Tensor) and _equal(given, plain_norm(x, weight, form, eps)[0])


def _equal(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return given.dtype == wanted.dtype and torch.equal(given, wanted)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return numbers between -2 and 2 on the CPU, without touching the process's generator."""
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.rand(shape, generator=generator, device="cpu") - 2).to(dtype)


def _is_gated_once(module: nn.Module, known: dict[object, bool]) -> bool:
    """Return the result of `is_gated`, tried once for all modules of one type with the same kind of activation."""
    act = getattr(module, "act_fn", None)
    if act is None:
        return False
    alike = act
    if isinstance(act, nn.Module) and not list(act.parameters()) and not list(act.buffers()):
        plain = {key: value for key, value in vars(act).items() if not key.startswith("_")}
        alike = type(act), repr(sorted(plain.items()))
    key = type(module), alike
    if key not in known:
        known[key] = is_gated(module)
    return known[key]


def is_gated(module: nn.Module) -> bool:
    """Return whether a module computes `down(silu(gate(x)) * up(x))` and nothing else."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(part, nn.Module) for part in parts) or not callable(getattr(module, "act_fn", None)):
        return False
    act: Any = module.act_fn
    stand_in = SimpleNamespace(
        gate_proj=lambda x: x * 1.5, up_proj=lambda x: x - 0.25, down_proj=lambda x: x * 3.0, act_fn=act
    )  # fmt: skip
    for dtype in TRIED:
        x = _numbers((2, 3, 16), dtype)
        try:
            with torch.no_grad():
                given = cast(Any, type(module)).forward(stand_in, x)
        except Exception as error:
            if is_of_the_device(error):
                raise
            return False
        if not isinstance(given, torch.Tensor) or not _equal(given, plain_gate(x * 1.5, x - 0.25) * 3.0):
            return False
    return True


def rotating(kind: type[nn.Module]) -> FunctionType | None:
    """Return the forward pass of an attention with another rotation; None if its own is not understood."""
    return _with_rotation(cast(Any, kind.forward))


def _with_rotation(forward: object) -> FunctionType | None:
    """Return the same function with another rotation; decorators are kept if they keep what they decorate."""
    if not isinstance(forward, FunctionType):
        return None
    names, cells = forward.__globals__, forward.__closure__
    if ROTATE in forward.__code__.co_names:
        rotate = names.get(ROTATE)
        if rotate is None or not _rotates_by_halves(rotate):
            return None
        names = {**names, ROTATE: partial(rotated, rotate)}
    else:
        within = getattr(forward, "__wrapped__", None)
        made = _with_rotation(within)
        if made is None or not any(_holds(cell, within) for cell in cells or ()):
            return None
        cells = tuple(CellType(made) if _holds(cell, within) else cell for cell in cells or ())
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, cells)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _rotates_by_halves(rotate: Callable[..., Any]) -> bool:
    for dtype, angles in (*zip(TRIED, TRIED, strict=True), TRIED):  # the type may be narrower than the angles'
        query, key = (_numbers((1, heads, 5, 8), dtype, heads) for heads in (2, 1))
        cos, sin = (_numbers((1, 5, 8), angles, seed) for seed in (3, 4))
        try:
            with torch.no_grad():
                given = rotate(query, key, cos, sin)
        except Exception as error:
            if is_of_the_device(error):
                raise
            return False
        wanted = [plain_rotation(part, cos[:, None], sin[:, None]) for part in (query, key)]
        if not all(_equal(one, other) for one, other in zip(given, wanted, strict=True)):
            return False
    return True
