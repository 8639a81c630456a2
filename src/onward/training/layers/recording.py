"""A computation that a GPU records once and replays in one launch (CUDA graphs), with the same kernels and memory.

A short computation on a GPU is mostly the host launching kernels, which a replay does not. A computation can be
recorded if nothing in it waits for the device, comes from main memory or draws random numbers. That is found out in an
ordinary pass (`Watch`), because a recording that fails halfway leaves PyTorch's allocator and its generators unusable.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onward.errors import first_line
from onward.training.seeds import one_computes, others_train

Result = TypeVar("Result", covariant=True)
KNOWN = frozenset({"aten", "prims", "torch_attn"})
"""Namespaces of operations that do nothing on the host but launch kernels, unless their tags say otherwise."""
DROPOUT = "dropout_p"
"""The argument of attention whose value 0 means that it draws no random numbers."""
PLACES = "indices"
"""The argument of operations that read or write elements by their places."""
MASKS = (torch.bool, torch.uint8)
"""Types of an index that selects a number of elements that only the device knows."""
FREE, KEPT = 0.25, 0.05
"""The share of a GPU's memory that must be free for something to be recorded, and the most that a recording may keep.
What it keeps must fit beside a step, which may take `memory.USABLE` of all."""


class Replay(Protocol[Result]):
    """A recorded computation."""

    def __call__(self) -> Result:
        """Compute again; the result is the same object every time, in the same memory."""
        ...


class Recorder(Protocol):
    """Records computations."""

    def __call__(self, compute: Callable[[], Result]) -> Replay[Result] | None:
        """Record a computation, without a result yet; return None if there is no room for it."""
        ...


class Watch(TorchDispatchMode):
    """Sees whether a computation could be recorded.

    Args:
        device: the device that computes.
        draws: whether it may draw random numbers on the device, which are drawn anew for each replay.
    """

    def __init__(self, device: torch.device, *, draws: bool = False) -> None:
        super().__init__()
        self._device, self._draws = device, draws
        self.hindrance = ""
        """The first operation that cannot be recorded; empty if there was none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.hindrance and not self._can_record(func, _by_name(func, args) | (kwargs or {}), found):
            self.hindrance = str(func)
        return found

    def _can_record(self, func: Any, arguments: Mapping[str, Any], found: Any) -> bool:
        if getattr(func, "namespace", None) not in KNOWN:
            return False
        tags = set(func.tags)
        if torch.Tag.data_dependent_output in tags:
            return False
        if torch.Tag.nondeterministic_seeded in tags and not self._draws and arguments.get(DROPOUT) != 0:
            return False
        if torch.Tag.dynamic_output_shape in tags and func.overloadpacket is not torch.ops.aten.index:
            return False
        if any(each.dtype in MASKS for each in _tensors(arguments.get(PLACES))):
            return False
        return all(each.device.type == self._device.type for each in [*_tensors(arguments), *_tensors(found)])


def _by_name(func: Any, given: Any) -> dict[str, Any]:
    """Return the values of an operation's arguments by name, with defaults for those not given."""
    schema = getattr(func, "_schema", None)  # operations that take functions have none
    arguments = schema.arguments if schema is not None else []
    named = zip(arguments, given, strict=False)
    return {each.name: each.default_value for each in arguments} | {each.name: value for each, value in named}


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


class Recordable(Generic[Result]):
    """A computation without arguments that is watched the first time, may be recorded then, and is replayed afterwards.

    Args:
        compute: the computation.
        device: the device that computes; no other thread may use a GPU while it is watched, so that is put off until
            no other trains.
        recorder: records it; None if it never is.
    """

    def __init__(self, compute: Callable[[], Result], device: torch.device, recorder: Recorder | None) -> None:
        self._compute, self._device, self._recorder = compute, device, recorder
        self._was_watched = False
        self.can_record = False
        """Whether it was watched and can be recorded."""
        self.hindrance = ""
        """What went wrong when it was recorded or replayed; empty if nothing did."""
        self._replay: Replay[Result] | None = None

    def __call__(self) -> Result:
        """Compute, or replay what was recorded."""
        if self._replay is not None:
            try:
                return self._replay()
            except Exception as error:  # another recording failed, for example; a lost device raises again
                self._fail(error)
        if self._was_watched or self._recorder is None:
            return self._compute()
        with one_computes:  # no other thread begins to train meanwhile
            return self._compute() if others_train() else self._watched()

    def record(self) -> bool:
        """Record it, if that was not done before and is possible; return whether the next call replays it."""
        if self._recorder is not None and self._was_watched and self._replay is None:
            try:
                with one_computes:  # no other thread can draw random numbers meanwhile
                    self._replay = self._recorder(self._compute)
            except Exception as error:  # too little memory, for example; it can still be computed
                self._fail(error)
            self._recorder = None
        return self._replay is not None

    def forget(self) -> None:
        """Forget the recording; from now on it is computed each time."""
        self._recorder = self._replay = None

    def _fail(self, error: Exception) -> None:
        self.forget()
        self.can_record, self.hindrance = False, f"{type(error).__name__}: {first_line(error)}"

    def _watched(self) -> Result:
        self._was_watched, watch = True, Watch(self._device)
        try:
            with _without_waiting(self._device), watch:
                found = self._compute()
        except Exception:  # it waited for the GPU; if it was something else, that is raised again
            self._recorder = None
            return self._compute()
        self.can_record = not watch.hindrance
        self._recorder = self._recorder if self.can_record else None
        return found


@contextlib.contextmanager
def _without_waiting(device: torch.device) -> Generator[None]:
    """Let PyTorch raise if something in the body waits for a GPU, in any thread."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # it warns that it does not find everything
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Recording(Generic[Result]):
    """A computation recorded on a GPU; what it computes with stays allocated.

    Args:
        compute: the computation, which was run before, so that everything that it compiles and keeps exists.
        place: where it is recorded.

    Raises:
        Exception: it cannot be recorded, and is not. If that was found at its end, earlier recordings are invalid.
    """

    def __init__(self, compute: Callable[[], Result], place: RecordingPlace) -> None:
        with place.recorded() as self._graph:
            self._result = compute()
        self._failures = len(_FAILED)

    def __call__(self) -> Result:
        """Compute again.

        Raises:
            RuntimeError: another recording failed since this one was made.
        """
        if self._failures != len(_FAILED):
            raise RuntimeError("another recording failed, which may have changed how random numbers are drawn")
        self._graph.replay()
        return self._result


_FAILED: list[Any] = []
"""Graphs whose recording failed. PyTorch's allocator of pinned memory may refer to them as long as the process runs."""


class RecordingPlace:
    """A stream of a GPU and memory, for recordings of which one is replayed at a time.

    Args:
        device: a CUDA device.
        cuda: `torch.cuda`, or a substitute for it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda, self._stream = device, cuda, cuda.Stream(device)
        self._pool: Any = cuda.graph_pool_handle()

    @contextlib.contextmanager
    def recorded(self) -> Generator[Any]:
        """Record what the body launches, and yield the graph of it, which can be replayed afterwards.

        The stream computes after what was begun before it and before what comes after it. The error of the body is
        raised, not the one that follows from it at the end of the recording.
        """
        graph, ordinary = self._cuda.CUDAGraph(), self._cuda.current_stream(self._device)
        self._stream.wait_stream(ordinary)
        with self._cuda.stream(self._stream):
            try:
                graph.capture_begin(self._pool, capture_error_mode="thread_local")  # other threads copy meanwhile
                yield graph
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        ordinary.wait_stream(self._stream)

    def _abandon(self, graph: Any) -> None:
        """End a recording that failed; what comes after it is recorded into other memory.

        If an operation failed on the device, PyTorch's own end stops halfway: what the recording allocated would never
        be free again, and the generator would refuse to draw. So the allocator is told, and the generator gets a fresh
        state.
        """
        index, pool = self._stream.device_index, self._pool
        self._pool = self._cuda.graph_pool_handle()
        try:
            graph.capture_end()
        except RuntimeError:
            _FAILED.append(graph)
            with contextlib.suppress(AttributeError, RuntimeError):  # it cannot be told, or knows
                self._cuda.memory._cuda_endAllocateToPool(index, pool)
                self._cuda.memory._cuda_releasePool(index, pool)
            with contextlib.suppress(RuntimeError):  # the device is lost, as the next computation says
                generator = self._cuda.default_generators[index]
                generator.graphsafe_set_state(generator.clone_state())
        graph.reset()


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records a short computation on a device; None if it cannot."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None

    def record(compute: Callable[[], Result]) -> Replay[Result] | None:
        total = torch.cuda.mem_get_info(device)[1]
        if _freed(device) < FREE * total:
            return None
        before = torch.cuda.memory_reserved(device)
        recording = Recording(compute, RecordingPlace(device))
        return recording if torch.cuda.memory_reserved(device) - before <= KEPT * total else None

    return record


def sharing_recorder(device: torch.device) -> Recorder:
    """Return what records into memory that all its recordings share, on a GPU that `recorder_for` has a recorder of."""
    place = RecordingPlace(device)

    def record(compute: Callable[[], Result]) -> Replay[Result]:
        _freed(device)
        return Recording(compute, place)

    return record


def _freed(device: torch.device) -> int:
    """Return the free bytes of a GPU; if few are, what this process only keeps is returned to it first."""
    free, total = torch.cuda.mem_get_info(device)
    if free < FREE * total:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    return free


def is_held(weight: torch.Tensor) -> bool:
    """Return whether an earlier computation still holds a weight's place in its graph.

    Its gradient would be added on the stream of that computation, which a recording does not allow.
    """
    _accumulator(weight).metadata[__name__] = True
    return __name__ in _accumulator(weight).metadata


def _accumulator(weight: torch.Tensor) -> Any:
    with torch.enable_grad():
        return weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
