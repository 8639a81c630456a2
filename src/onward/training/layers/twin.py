"""A second model, for inference, that shares the weights of the one being trained and changes nothing in it.

Evaluation does not always only read. RWKV divides weights in place, bitsandbytes packs 4-bit weights on a CPU: training
would continue with what was written. Modules that do so are found by watching every write of a forward pass before it
happens; they are left in training mode, in which they do not write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from onward.errors import ModelError
from onward.training.layers.buffers import own_buffers

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""Attributes in which PyTorch's modules keep their hooks: a hook on the twin is not one on the model, nor the other way
round. FSDP2 reshards a model's weights whenever a state dict is requested, which may happen in another thread."""
ROUNDS = 8
"""How many types of modules may be found to write, one per round."""


def with_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model in evaluation mode with these weights, by name of `model`'s parameters, that shares all others.

    Its own weights have gradients of their own, and its buffers are its own. Modules are copied, but not what they
    hold: a deep copy takes longer than a step of a small model.
    """
    own: dict[int, nn.Parameter] = {
        id(parameter): nn.Parameter(weights[name]) for name, parameter in model.named_parameters() if name in weights
    }
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        new = made[id(module)] = copy.copy(module)
        held, parts = vars(module)["_parameters"], vars(module)["_modules"]
        vars(new).update((name, vars(module)[name].copy()) for name in HOOKS)
        vars(new).update(_bound_to(new, module))
        vars(new)["_parameters"] = {name: own.get(id(weight), weight) for name, weight in held.items()}
        vars(new)["_buffers"] = own_buffers(vars(module)["_buffers"])
        vars(new)["_modules"] = {name: None if part is None else twin(part) for name, part in parts.items()}
        return new

    return twin(model).eval()


def _bound_to(new: nn.Module, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield methods that were set on a module itself, such as its forward pass, as methods of its copy."""
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            yield name, MethodType(value.__func__, new)
        elif isinstance(value, partial) and any(given is module for given in value.args):
            given = (new if each is module else each for each in value.args)
            yield name, partial(value.func, *given, **value.keywords)


def writers_in_evaluation(model: nn.Module, forward: Callable[[nn.Module], object]) -> frozenset[type[nn.Module]]:
    """Return the types of modules that would write to the model's weights in evaluation mode; nothing is written.

    Args:
        forward: runs a forward pass of the twin that it is given.

    Raises:
        ModelError: weights are written to, but not by a module of the model, or in training mode too.
    """
    packing = {type(module) for module in model.modules() if _packs(module)}
    found: frozenset[type[nn.Module]] = frozenset(packing)
    names = {_place(parameter): name for name, parameter in model.named_parameters()}
    for _ in range(ROUNDS):
        twin = let_write_nothing(with_weights(model, {}), found)
        try:
            with torch.no_grad(), _Guard(names):
                forward(twin)
        except _Write as write:
            writer = _innermost(twin, write.__traceback__)
            if writer is None or type(writer) in found:
                raise writes(write.name) from None
            found |= {type(writer)}
        else:
            break
    return found


def named_types(types: Iterable[type[nn.Module]]) -> tuple[str, ...]:
    """Return the names of types of modules, for `types_named`."""
    return tuple(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in types))


def types_named(model: nn.Module, names: Collection[str]) -> frozenset[type[nn.Module]]:
    """Return the types of a model's modules that have these names."""
    return frozenset(kind for kind in map(type, model.modules()) if names and named_types([kind])[0] in names)


def let_write_nothing(twin: nn.Module, writers: frozenset[type[nn.Module]]) -> nn.Module:
    """Leave the modules of these types in training mode; modules inside them stay in evaluation mode."""
    for module in twin.modules():
        if type(module) in writers:
            module.training = True
    return twin


def keeps_process_state(model: nn.Module) -> bool:
    """Return whether a forward pass uses process-wide state, so that two must not run at once.

    PyTorch's cache of parametrized weights is such state, and PEFT's adapters for parameters use it. `ExpertLora`,
    which replaces them, does not.
    """
    return any(type(module) is ParamWrapper or parametrize.is_parametrized(module) for module in model.modules())


def writes(name: str) -> ModelError:
    """Return the refusal of a model that writes to a weight when it is evaluated."""
    return ModelError(
        f"a forward pass in evaluation changes the weight {name}",
        where="the model",
        hint="What is trained would depend on when the model was measured, so nothing was trained. Use another model.",
    )


class _Write(Exception):
    """A weight was about to be written to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Guard(TorchDispatchMode):
    """Stops a forward pass before it writes to the memory of a weight."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func.overloadpacket is torch.ops.aten.set_ and _place(args[0]) == _place(args[-1]):
            return func(*args, **given)  # parametrizing a weight sets it to itself
        for tensor in _written(func, args, given):
            if _place(tensor) in self._names:
                raise _Write(self._names[_place(tensor)])
        return func(*args, **given)


def _written(func: Any, args: Any, given: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation writes to, as its schema says."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else given.get(argument.name)
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if isinstance(each, torch.Tensor))


def _place(held: object) -> int:
    """Return where the memory of a tensor begins, for any view of it; on the meta device it has none."""
    return (held.untyped_storage().data_ptr() or id(held)) if isinstance(held, torch.Tensor) else 0


def _innermost(twin: nn.Module, trace: TracebackType | None) -> nn.Module | None:
    """Return the module in whose code an error was raised."""
    parts, found = set(twin.modules()), None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in parts:
            found = owner
        trace = trace.tb_next
    return found


def _packs(module: nn.Module) -> bool:
    """Whether a module holds a quantized weight on a CPU, which bitsandbytes packs on evaluation."""
    weight = vars(module)["_parameters"].get("weight")
    return weight is not None and weight.device.type == "cpu" and hasattr(weight, "quant_state")
