"""What may be recorded on a GPU, as seen on a CPU: nothing that waits, draws, or moves between devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fake_cuda import Graphs
from op_recorder import OpRecorder
from rows import CPU, tiny_model
from torch.nn import functional

from onward.training.layers.attention import lay_end_to_end
from onward.training.layers.recording import Recordable, Recording, RecordingPlace, Watch, is_held
from onward.training.measuring.fingerprints import Fingerprints
from onward.training.measuring.probe import Probe
from onward.training.seeds import one_computes, taking_steps

VALUES = torch.arange(12.0).view(3, 4)
META = torch.empty(3, 4, device="meta")
HEADS = torch.ones(1, 2, 5, 8)

NOT_RECORDED: dict[str, Callable[[], object]] = {
    "a number": lambda: float(VALUES.sum()),
    "a truth": lambda: bool(VALUES.any()),
    "a comparison": lambda: torch.equal(VALUES, VALUES + 1),
    "where": lambda: VALUES.nonzero(),
    "a mask": lambda: VALUES[VALUES > 3],
    "a mask of bytes": lambda: VALUES[:, torch.tensor([1, 0, 1, 1], dtype=torch.uint8)],
    "written by a mask": lambda: VALUES.clone().index_put_((VALUES > 3,), torch.ones(8)),
    "written by a mask, anew": lambda: VALUES.index_put((VALUES > 3,), torch.ones(8), accumulate=True),
    "selected": lambda: torch.masked_select(VALUES, VALUES > 3),
    "different ones": lambda: VALUES.unique(),
    "repeated by numbers": lambda: torch.repeat_interleave(VALUES, torch.tensor([1, 2, 0]), 0),
    "drawn": lambda: torch.rand(3),
    "dropout": lambda: functional.dropout(VALUES, 0.5),
    "attention with dropout": lambda: functional.scaled_dot_product_attention(HEADS, HEADS, HEADS, dropout_p=0.5),
    "another device": lambda: torch.empty_like(VALUES, device="meta").copy_(VALUES),
    "from another device": lambda: META + 1,
}
RECORDED: dict[str, Callable[[], object]] = {
    "a product": lambda: VALUES @ VALUES.T,
    "indices": lambda: VALUES[torch.tensor([0, 2, 2])],
    "written by indices": lambda: VALUES.clone().index_put_((torch.tensor([0, 2]),), torch.ones(4)),
    "looked up": lambda: functional.embedding(torch.tensor([0, 2]), VALUES),
    "no dropout": lambda: functional.dropout(VALUES, 0.5, training=False),
    "attention": lambda: functional.scaled_dot_product_attention(HEADS, HEADS, HEADS, is_causal=True),
    "a mask to fill": lambda: VALUES.masked_fill(VALUES > 3, 0.0).where(VALUES < 9, VALUES),
    "sums by place": lambda: torch.zeros(3, 4).index_add_(0, torch.tensor([0, 2]), VALUES[:2]),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_cannot_be_recorded_is_seen(name: str) -> None:
    """By the operations that PyTorch runs, whoever calls them."""
    with Watch(CPU) as watch:
        NOT_RECORDED[name]()
    assert watch.hindrance


@pytest.mark.parametrize("name", RECORDED)
def test_what_can_be_recorded_is_seen(name: str) -> None:
    """Operations whose sizes the host knows."""
    with Watch(CPU) as watch:
        RECORDED[name]()
    assert "" == watch.hindrance


def test_a_backward_pass_is_watched_too() -> None:
    """What a gradient is computed with counts like the rest."""

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: torch.Tensor) -> torch.Tensor:
            """Return the input."""
            return x.clone()

        @staticmethod
        def backward(_: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            """Wait for a number."""
            return grad * float(grad.sum())

    x = VALUES.clone().requires_grad_()
    with Watch(CPU) as watch:
        loss = Waits.apply(x).sum()  # type: ignore[no-untyped-call]
        before = watch.hindrance
        loss.backward()
    assert "" == before
    assert "aten._local_scalar_dense.default" == watch.hindrance


def test_operations_that_take_functions_are_not_recorded() -> None:
    """They have no list of arguments to look at."""
    watch = Watch(CPU)
    assert [3] == watch.__torch_dispatch__(lambda: [3], ())
    assert watch.hindrance


def test_draws_may_be_allowed() -> None:
    """A recording draws anew each time, which is what dropout is for."""
    with Watch(CPU, draws=True) as watch:
        functional.dropout(VALUES, 0.5)
    assert "" == watch.hindrance


def test_a_computation_is_watched_once_and_recorded_on_demand() -> None:
    """Before that it is computed each time; after `forget` again."""
    computed, replayed = [0], [0]

    def compute() -> int:
        computed[0] += 1
        return computed[0]

    def replay() -> int:
        replayed[0] += 1
        return -1

    own = Recordable(compute, CPU, lambda _: replay)
    assert not own.record()
    assert [1, 2] == [own(), own()]
    assert own.record()
    assert own.can_record
    assert -1 == own()
    own.forget()
    assert 3 == own()
    assert not own.record()
    assert ([3], [1]) == (computed, replayed)


def test_nothing_is_watched_while_another_thread_trains() -> None:
    """What waits for a GPU is an error then, in any thread: another run would fail. It is watched later."""
    own = Recordable(lambda: 7, CPU, lambda _: lambda: -1)
    begun, ended = threading.Event(), threading.Event()

    def train() -> None:
        with taking_steps():
            begun.set()
            ended.wait(60)

    other = threading.Thread(target=train)
    other.start()
    begun.wait(60)
    assert (7, False, False) == (own(), own.can_record, own.record())
    ended.set()
    other.join(60)
    with taking_steps():
        assert (7, True, True) == (own(), own.can_record, own.record())
    assert -1 == own()


def test_others_wait_while_something_is_watched_or_recorded() -> None:
    """Another thread could not draw random numbers then, nor wait for a GPU: its step would fail."""
    found: list[bool] = []

    def is_free() -> bool:
        is_taken = one_computes.acquire(blocking=False)
        if is_taken:
            one_computes.release()
        return is_taken

    with ThreadPoolExecutor(1) as other:

        def compute() -> int:
            found.append(other.submit(is_free).result())
            return 7

        def record(each: Callable[[], int]) -> Callable[[], int]:
            each()
            return each

        own = Recordable(compute, CPU, record)
        assert (7, True) == (own(), own.record())
        assert [False, False] == found


def test_a_thread_begins_to_train_when_nobody_computes() -> None:
    """It might wait for a GPU where another thread watches for that."""
    order: list[str] = []
    begun = threading.Event()

    def train() -> None:
        begun.set()
        with taking_steps():
            order.append("trains")

    other = threading.Thread(target=train)
    with one_computes:
        other.start()
        begun.wait(60)
        order.append("computed")
    other.join(60)
    assert ["computed", "trains"] == order


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, TypeError])
def test_a_recording_that_fails_is_not_tried_again(error: type[Exception]) -> None:
    """It is computed as usual."""
    tries: list[int] = []

    def fail(_: object) -> None:
        tries.append(1)
        raise error("no")

    own = Recordable(lambda: 7, CPU, fail)
    assert 7 == own()
    assert [False, False] == [own.record(), own.record()]
    assert 7 == own()
    assert [1] == tries


@pytest.mark.parametrize("where", ["on the device", "in Python", "at its end"])
def test_a_recording_that_fails_leaves_nothing_behind(where: str) -> None:
    """No memory is taken for it any more, none is kept, random numbers can be drawn, and others can be recorded.

    What is raised is the first error, not the one that follows from it at the end.
    """
    cuda = Graphs(lacks_memory=where == "at its end")
    compute = {"on the device": cuda.fail, "in Python": lambda: {}["no"], "at its end": lambda: 7}[where]
    place = RecordingPlace(CPU, cuda)
    wanted = {"on the device": "not permitted", "in Python": "no", "at its end": "out of memory"}[where]
    with pytest.raises((RuntimeError, KeyError), match=wanted):
        Recording(compute, place)
    cuda.default_generators[0].draw()
    assert ([], [0]) == (cuda.device.underway, list(cuda.device.users.values()))
    cuda.lacks_memory = False
    assert 7 == Recording(lambda: 7, place)()


def test_after_a_failure_on_the_device_earlier_recordings_are_not_replayed() -> None:
    """They might draw other random numbers; what a recordable computation gives is computed again."""
    cuda = Graphs()
    first = Recordable(lambda: 7, CPU, lambda compute: Recording(compute, RecordingPlace(CPU, cuda)))
    first()
    assert first.record()
    earlier = Recording(lambda: 8, RecordingPlace(CPU, cuda))
    with pytest.raises(KeyError):
        Recording(lambda: {}["no"], RecordingPlace(CPU, cuda))
    assert (7, 8) == (first(), earlier())
    with pytest.raises(RuntimeError, match="not permitted"):
        Recording(cuda.fail, RecordingPlace(CPU, cuda))
    with pytest.raises(RuntimeError, match="another recording failed"):
        earlier()
    assert 7 == first()
    assert not first.record()


class Replays:
    """Records a probe: computes it again, with another result from some replay on."""

    def __init__(self, right: int = 1 << 30) -> None:
        self.replays, self._right = 0, right

    def __call__(self, compute: Callable[[], object]) -> Callable[[], object]:
        """Record."""

        def replay() -> object:
            self.replays += 1
            found = compute()
            if self.replays > self._right:
                found.total.add_(1)  # type: ignore[attr-defined]
            return found

        return replay


def end_to_end() -> Any:
    """Return a model that attends to rows laid end to end; padded ones wait for their number of targets."""
    model: Any = tiny_model("llama", "sdpa")
    lay_end_to_end(model)
    return model


def test_a_probe_is_replayed_once_it_gave_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells of changed weights what one without a recording tells."""
    monkeypatch.setattr("onward.training.layers.buffers.SMALL", 0)
    model = end_to_end()
    recorder = Replays()
    probe, plain = Probe(model, 0, CPU, torch.float32, recorder=recorder), Probe(model, 0, CPU, torch.float32)
    before = probe.of_model()
    assert probe.can_record
    assert before == probe.again(before) == plain.of_model()
    assert 1 == recorder.replays
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1.0
    after = probe.of_model()
    assert 2 == recorder.replays
    assert before != after
    assert after == plain.of_model()


def test_nothing_of_a_probe_is_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations alone, run again on the same memory, tell of other weights what they are."""
    monkeypatch.setattr("onward.training.layers.buffers.SMALL", 0)
    monkeypatch.setattr(Fingerprints.__init__, "__defaults__", ("none",))  # digested as on a GPU, wherever it is
    model, recorder = end_to_end(), OpRecorder()
    probe, plain = (Probe(model, 0, CPU, torch.float32, recorder=each) for each in (recorder, None))
    before = probe.of_model()
    assert before == probe.again(before)
    begun = probe.begin()  # read after later replays
    for weight in model.parameters():
        with torch.no_grad():
            weight.mul_(1.5)
        assert plain.of_model() == probe.of_model() != before
    assert before == begun()
    assert recorder.replays > 10


def test_a_probe_that_is_recorded_wrongly_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not give what was computed is dropped at once."""
    monkeypatch.setattr("onward.training.layers.buffers.SMALL", 0)
    recorder = Replays(right=0)
    probe = Probe(end_to_end(), 0, CPU, torch.float32, recorder=recorder)
    before = probe.of_model()
    assert [before, before] == [probe.again(before), probe.of_model()]
    assert 1 == recorder.replays


def test_a_weight_is_held_as_long_as_a_graph_is() -> None:
    """Graphs are freed with the losses that hold them."""
    weight = torch.nn.Parameter(torch.ones(3))
    assert not is_held(weight)
    loss = (weight * 2).sum()
    assert is_held(weight)
    del loss
    assert not is_held(weight)
