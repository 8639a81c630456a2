"""Parts of a step that are replayed: the bits of those computed as usual, or nothing is replayed.

Everything is tested but the GPU's own recording (`gpu/test_recording.py`): here its operations are kept and run again,
or the whole computation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from one_call import let_attend_in_one_call
from op_recorder import OpRecorder
from rows import CPU, VOCABULARY, tiny_model

from onward.config import Config
from onward.data.plan.loader import Batch
from onward.data.plan.order import FilePlan, RowReference
from onward.data.tokenized import Row
from onward.training.accumulation import Accumulation
from onward.training.device.execution import Execution
from onward.training.device.memory import Usage
from onward.training.layers.attention import lay_end_to_end
from onward.training.layers.fused_lora import fuse_lora
from onward.training.layers.recording import is_held
from onward.training.state import Cursor, TrainState
from onward.training.steps.anchor import AnchorTerm
from onward.training.steps.economy import ROOMY, Learned
from onward.training.steps.memory import largest_part
from onward.training.steps.recorded_parts import PROOFS, RecordedParts
from onward.training.trainer import Trainer
from onward.training.world import SingleProcess

Compute = Callable[[], torch.Tensor]
LENGTHS = ((9, 2, 17, 6), (30, 4), (9, 3, 17, 6), (50, 60, 50, 33), (12,), (60, 60, 50, 30), (20, 20, 20))


@pytest.fixture(autouse=True)
def _one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    let_attend_in_one_call(monkeypatch)


class Recorder:
    """Records a computation by keeping it; counts replays.

    Args:
        spoils: the number of the replay whose gradients get another bit, from 1; 0 for none.
    """

    def __init__(self, spoils: int = 0) -> None:
        self.recorded = self.replays = 0
        self._spoils = spoils

    def __call__(self, compute: Compute) -> Compute:
        """Record."""
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replays += 1
            loss = compute()
            return loss + (self.replays == self._spoils)

        return replay


def make_trainer(recorder: Any, method: str = "lora", **settings: Any) -> Trainer:
    """Return a trainer of a tiny model; None as a recorder for one that records nothing."""
    from peft import LoraConfig, get_peft_model

    config = Config.model_validate({"method": method, "max_length": 64, "batch_size": 4, **settings})
    model: Any = tiny_model("llama", "sdpa")
    lay_end_to_end(model)
    if method == "lora":
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=config.lora.dropout, target_modules="all-linear")
        ).train()
        fuse_lora(model)
    state = TrainState.start(model, config)
    state.cursor = Cursor(1, "file", 0, 1 << 10)
    learned = Learned(can_record=recorder is not None)
    if recorder is not None:
        learned.recorded = RecordedParts(list(state.parameters.values()), recorder)
    anchor = None
    if config.anchor.weight:
        texts, shape = [Row(row.ids, np.arange(8) > 0) for row in batch((8,) * 5, 1).rows], (5, 7, 3)
        ids = torch.arange(5 * 7 * 3).reshape(shape) % VOCABULARY
        anchor = AnchorTerm(texts, ids, torch.full(shape, -2.0), config.anchor.weight)
    return Trainer(state, config, Execution(SingleProcess(CPU), torch.float32), anchor, learned=learned)


def batch(lengths: tuple[int, ...], seed: int) -> Batch:
    """Return rows of these lengths, of other tokens for each seed."""
    source = np.random.default_rng(seed)
    rows = [Row(source.integers(3, VOCABULARY, length), source.random(length) < 0.7) for length in lengths]
    return Batch(rows, [RowReference("file", place) for place in range(len(rows))], list(range(len(rows))))


def train(trainer: Trainer, rounds: int = 2) -> tuple[list[float], str, str]:
    """Return the losses of some steps, and the digests of weights and moments after them."""
    plan = FilePlan("file", rows=1 << 12, batch_size=4, epochs=1, seed=0)
    losses = [
        trainer.take_step(batch(lengths, 10 * turn + place), plan).loss
        for turn in range(rounds)
        for place, lengths in enumerate(LENGTHS)
    ]
    digest = trainer.state.view().digest()
    return losses, digest.weights, digest.moments


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"rank": 4, "dropout": 0.0}},
        {"lora": {"rank": 4, "dropout": 0.2}},
        {"lora": {"rank": 4, "dropout": 0.2}, "gradient_accumulation": 2},
        {"lora": {"rank": 4, "dropout": 0.1}, "micro_batch_tokens": 64},
        {"method": "full"},
        {"lora": {"rank": 4, "dropout": 0.2}, "anchor": {"weight": 0.5}},
    ],
    ids=["plain", "dropout", "two parts", "parts by tokens", "full", "anchor"],
)
def test_replays_give_the_bits_of_what_is_computed_as_usual(settings: dict[str, Any]) -> None:
    """Steps of many sizes, with other rows and dropout each time: losses, weights and moments are equal."""
    recorder = OpRecorder()
    trainer = make_trainer(recorder, **settings)
    found = train(trainer)
    assert "" == trainer.economy.recorded_parts(batch((9,), 0)).hindrance  # type: ignore[union-attr]
    assert train(make_trainer(None, **settings)) == found
    assert recorder.recorded + PROOFS < recorder.replays


@pytest.mark.parametrize("spoiled", [1, 2])
def test_one_other_bit_ends_recording(spoiled: int) -> None:
    """A replay that does not give what was computed as usual counts for nothing, and is the last one."""
    recorder = Recorder(spoiled)
    trainer = make_trainer(recorder)
    found = train(trainer)
    assert spoiled == recorder.replays
    assert train(make_trainer(None)) == found


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, TypeError])
def test_what_cannot_be_recorded_is_computed_as_usual(error: type[Exception]) -> None:
    """Too little memory while recording: the step is taken nevertheless, and nothing is tried again."""
    calls: list[int] = []

    def fail(compute: Compute) -> Compute:
        calls.append(1)
        compute()
        raise error("out of memory")

    assert train(make_trainer(None)) == train(make_trainer(fail))
    assert [1] == calls


def test_attention_row_by_row_is_found_before_anything_is_recorded() -> None:
    """Where rows begin is known on the host then, so that a recording would be of these rows only."""
    found: list[Any] = []
    for recorder in (OpRecorder(), None):
        trainer = make_trainer(recorder, lora={"rank": 4, "dropout": 0.0})
        for part in trainer.state.model.modules():
            if hasattr(part, "attention_dropout"):
                part.attention_dropout = 0.1  # type: ignore[assignment]
        found.append(train(trainer, 1))
        recorded = trainer.economy.learned.recorded
        assert recorder is None or (0, False) == (recorder.recorded, recorded.was_tried)  # type: ignore[union-attr]
        assert recorder is None or "row by row" in recorded.hindrance  # type: ignore[union-attr]
    assert found[0] == found[1]


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_a_replay_that_fails_is_computed_as_usual(failing: int) -> None:
    """Before replays are trusted and after: the step is taken nevertheless, and nothing is replayed any more."""
    recorder = Recorder()

    def fails(compute: Compute) -> Compute:
        replay = recorder(compute)

        def run() -> torch.Tensor:
            found = replay()
            if recorder.replays == failing:
                raise RuntimeError("another recording failed")
            return found

        return run

    trainer = make_trainer(fails)
    assert train(make_trainer(None)) == train(trainer)
    assert failing == recorder.replays
    assert trainer.economy.learned.recorded is not None
    assert "RuntimeError: another recording failed" == trainer.economy.learned.recorded.hindrance


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_weight_that_only_a_cycle_holds_can_be_recorded(is_kept: bool) -> None:
    """A graph that refers to itself, as one of a caught error may, is freed first; one that is in use is not."""
    recorder = OpRecorder()
    trainer = make_trainer(recorder)
    weight = next(iter(trainer.state.parameters.values()))
    graph: list[Any] = [(weight * 2).sum()]
    graph.append(graph)
    kept = graph if is_kept else None
    gc.disable()
    try:
        del graph
        assert is_held(weight)
        train(trainer, 1)
    finally:
        gc.enable()
    assert (kept is None) == (recorder.recorded > 0)


def test_weights_that_moved_end_recording() -> None:
    """A recording reads the memory that weights were in; where one is elsewhere, parts are computed as usual."""
    recorder = OpRecorder()
    recorded, usual = make_trainer(recorder), make_trainer(None)
    assert train(usual, 1) == train(recorded, 1)
    replays = recorder.replays
    for trainer in (recorded, usual):
        weight = next(iter(trainer.state.parameters.values()))
        weight.data = weight.data.clone()
    assert train(usual, 1) == train(recorded, 1)
    assert 0 < replays == recorder.replays


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_recordings_are_the_first_to_go_if_memory_runs_out(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is taken again without them; only if that lacks memory too, layers are recomputed, if they may be."""
    trainer = make_trainer(Recorder(), activation_checkpointing=setting)
    left, parts = [9], Accumulation._add_part

    def add_part(self: Accumulation, *arguments: Any, **options: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return parts(self, *arguments, **options)

    monkeypatch.setattr(Accumulation, "_add_part", add_part)
    found = train(trainer)
    assert (True, None) == (trainer.economy.learned.lacks_memory, trainer.economy.learned.recorded)
    assert not trainer.economy.always
    assert train(make_trainer(None)) == found


@pytest.mark.parametrize(("missing", "records"), [(0, True), (1 << 20, False)])
def test_parts_are_recorded_where_there_is_room(missing: int, records: bool) -> None:
    """What they keep, their gradients twice, and the largest part of a step must take at most three quarters."""
    trainer = make_trainer(Recorder())
    rows = batch((20, 20, 20), 0)
    own, largest = (trainer.economy.profile.estimate(part) for part in ([64], largest_part(trainer.config)))
    taken = own.gradients + own.gradients + own.activations + own.logits + largest.total
    room = int(taken / ROOMY) + 2 - missing
    trainer.economy.learned.read = lambda _: Usage(room, room, 0)
    assert records == (trainer.economy.recorded_parts(rows) is not None)


def test_recordings_go_where_they_are_switched_off() -> None:
    """What they keep is free then."""
    recorder = OpRecorder()
    trainer = make_trainer(recorder)
    train(trainer)
    trainer.economy.follow(trainer.config.model_copy(update={"cuda_graphs": "off"}))
    replays = recorder.replays
    train(trainer)
    assert 0 < replays == recorder.replays
    assert trainer.economy.learned.recorded is None


def test_several_processes_record_nothing() -> None:
    """Then the parts of a step are computed as usual."""
    recorder = Recorder()
    trainer = make_trainer(recorder)
    trainer.accumulation.world = SingleProcess(CPU, size=2)  # as far as a step asks
    train(trainer)
    assert 0 == recorder.recorded


def test_what_was_learned_of_another_model_is_refused() -> None:
    """Its loss would leave the gradients in the other model's weights."""
    one, other = make_trainer(None), make_trainer(None)
    with pytest.raises(AssertionError, match="another model"):
        Trainer(one.state, one.config, one.execution, learned=other.economy.learned)


def test_what_cannot_be_watched_is_computed_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself may meet an operation that allows none; the step is taken nevertheless."""

    def refuse(*_: object) -> None:
        raise TypeError("no rule for this operation")

    wanted = train(make_trainer(None))
    monkeypatch.setattr("onward.training.steps.recorded_parts.Watch.__torch_dispatch__", refuse)
    recorder = Recorder()
    assert wanted == train(make_trainer(recorder))
    assert 0 == recorder.recorded


def test_measuring_memory_lets_go_of_what_it_computed() -> None:
    """No weight is held by a graph that is never freed: a GPU could not record a step then."""
    trainer = make_trainer(None)
    assert trainer.economy.profile.whole.token > 0
    assert [] == [name for name, weight in trainer.state.parameters.items() if is_held(weight)]
