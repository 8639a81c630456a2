"""Checkpoints of other tools are read as plain values: arguments without unpickling, schedules by proof."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import small_config
from torch import nn
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from onward.config.text import parse_config
from onward.errors import DamagedState
from onward.training.foreign.arguments import Arguments, read_arguments
from onward.training.foreign.folders import TrainerFolder
from onward.training.foreign.pickles import Inert, NotAPickle, read_saved, run_pickle
from onward.training.foreign.schedules import TrainerSchedule, read_schedule, schedule_settings
from onward.training.foreign.settings import argument_settings, left_out, router_loss
from onward.training.schedule import learning_rate

PEAK, TOTAL = 3e-4, 37


class Word(enum.Enum):
    """An enumeration, as the Trainer has them."""

    LINEAR = "linear"


class Thing:
    """An object with attributes and an enumeration among them."""

    def __init__(self) -> None:
        self.values = {"a": [1, 2.5, None], "b": (True, "x" * 300, b"y"), "c": {"d": 2**70}}
        self.word = Word.LINEAR
        self.many = {1, 2}


class Bomb:
    """A pickle that would make a folder where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_read_as_plain_values(protocol: int) -> None:
    """Numbers, texts, lists and dicts are those that were written; classes and calls are stand-ins."""
    found = run_pickle(io.BytesIO(pickle.dumps(Thing().values, protocol)))
    assert {**Thing().values, "b": (True, "x" * 300)} == {**found, "b": found["b"][:2]}
    thing = run_pickle(io.BytesIO(pickle.dumps(Thing(), protocol)))
    assert isinstance(thing, Inert)
    state: Any = thing.state
    assert ("linear",) == state["word"].arguments
    assert state["word"].name.endswith("Word")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(protocol: int, tmp_path: Path) -> None:
    """What a pickle would call when it is loaded is not called."""
    place = tmp_path / "made"
    found = run_pickle(io.BytesIO(pickle.dumps(Bomb(place), protocol)))
    assert isinstance(found, Inert)
    assert (str(place),) == found.arguments
    assert not place.exists()


def test_bytes_that_are_no_pickle_are_refused() -> None:
    """Whatever a file holds, reading it ends with a value or with one kind of error."""
    source = random.Random(3)
    whole = pickle.dumps(Thing(), 2)
    for number in range(400):
        torn = bytearray(whole[: source.randrange(1, len(whole))] if number % 2 else whole)
        for _ in range(number % 5 * 2):
            torn[source.randrange(len(torn))] = source.randrange(256)
        with contextlib.suppress(NotAPickle):
            run_pickle(io.BytesIO(bytes(torn)))


@pytest.mark.parametrize("way", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive_is_read_or_is_none(way: int, tmp_path: Path) -> None:
    """However its members are compressed, a bit that changed anywhere in it gives a value, or a refusal."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", way) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"steps": list(range(300))}))
    path, data, refused = tmp_path / "training_args.bin", packed.getvalue(), 0
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            read_saved(path)
        except NotAPickle:
            refused += 1
    assert refused > 20


def saved_arguments(folder: Path, **settings: Any) -> Arguments:
    """Return what is read of arguments that `torch.save` wrote."""
    torch.save(TrainingArguments(str(folder), use_cpu=True, report_to=[], **settings), folder / "training_args.bin")
    return read_arguments(folder)


def test_arguments_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Numbers, those of NumPy too, and words, of enumerations the value."""
    arguments = saved_arguments(tmp_path, lr_scheduler_type="cosine", seed=7, max_grad_norm=0.3)
    assert ("", 1) == (arguments.missing, arguments.processes)
    assert ("cosine", 7, 0.3) == (
        arguments.text("lr_scheduler_type"), arguments.number("seed", 0), arguments.number("max_grad_norm", 0)
    )  # fmt: skip
    numbers = {"gradient_accumulation_steps": np.int64(4), "max_grad_norm": np.float32(0.3), "weight_decay": np.ones(1)}
    arguments = saved_arguments(tmp_path, **numbers)
    assert [4, float(np.float32(0.3)), -1] == [arguments.number(name, -1) for name in numbers]


def test_arguments_of_an_old_torch_are_read(tmp_path: Path) -> None:
    """A file in the layout before PyTorch 1.6, which is several pickles in a row."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], seed=11)
    torch.save(arguments, tmp_path / "training_args.bin", _use_new_zipfile_serialization=False)
    assert 11 == read_arguments(tmp_path).number("seed", 0)


@pytest.mark.parametrize("content", [None, b"", b"nothing", b"PK\x03\x04 half an archive"])
def test_missing_arguments_are_said(content: bytes | None, tmp_path: Path) -> None:
    """Without arguments, or with a file that holds none, there are no values and a reason."""
    if content is not None:
        (tmp_path / "training_args.bin").write_bytes(content)
    arguments = read_arguments(tmp_path)
    assert {} == arguments.values
    assert "training_args.bin" in arguments.missing


BATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], int, tuple[int, int]]] = {
    "one device": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, {}, 1, (15, 5)),
    "processes": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {}, 4, (24, 8)),
    "DataParallel": ({"per_device_train_batch_size": 3, "_n_gpu": 2}, {"train_batch_size": 6}, 1, (6, 2)),
    "found by itself": ({"per_device_train_batch_size": 8}, {"train_batch_size": 2}, 1, (2, 1)),
    "not in the state": ({"per_device_train_batch_size": 4}, {"train_batch_size": None}, 1, (4, 1)),
    "nowhere": ({}, {"train_batch_size": 0}, 1, (8, 1)),
    "DataParallel, not in the state": ({"per_device_train_batch_size": 3, "_n_gpu": 2}, {}, 1, (6, 2)),
    "split batches": (
        {"per_device_train_batch_size": 8, "accelerator_config": {"split_batches": True}}, {}, 2, (8, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_the_rows_of_a_step_are_the_trainers(case: str, tmp_path: Path) -> None:
    """Rows per device, accumulation and devices make the rows of one optimizer step."""
    values, state, processes, expected = BATCHES[case]
    folder = TrainerFolder(tmp_path, None, {"global_step": 5, **state})
    found = argument_settings(folder, Arguments({**values, "seed": 0, "max_grad_norm": None}, processes=processes))
    assert expected == (found["batch_size"], found["gradient_accumulation"])
    assert (0, 0.0) == (found["seed"], found["max_grad_norm"])


def test_processes_are_counted_by_what_they_left(tmp_path: Path) -> None:
    """Each process of several leaves the state of its random generators. Those that share rows count as one."""
    for rank in range(6):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    assert 6 == saved_arguments(tmp_path).processes
    shared = SimpleNamespace(dp_shard_size=3, tp_size=2, cp_size=None, sp_size=1)
    torch.save(SimpleNamespace(parallelism_config=shared), tmp_path / "training_args.bin")
    assert 3 == read_arguments(tmp_path).processes


def test_warmup_is_a_count_or_a_share() -> None:
    """From 1 on it counts steps; below it is a share of all, under either key, rounded up."""
    values = [{"warmup_steps": 1}, {"warmup_steps": 25.0}, {"warmup_steps": 0.5}, {"warmup_ratio": 0.031}, {}]
    assert [1, 25, 50, 4, 0] == [Arguments(each).warmup_steps(100) for each in values]
    assert 4 == Arguments({"warmup_steps": 0, "warmup_ratio": 0.031}).warmup_steps(100)


def test_what_is_not_taken_is_named_with_a_reason() -> None:
    """Arguments that a run has no counterpart for, and only those that are set."""
    values = {"neftune_noise_alpha": 5.0, "packing": True, "data_seed": None, "num_train_epochs": 3.0, "max_steps": -1}
    lines = list(left_out(Arguments({**values, "assistant_only_loss": False, "completion_only_loss": None})))
    names = ["num_train_epochs", "neftune_noise_alpha", "packing", "assistant_only_loss"]
    assert names == [line.split()[0] for line in lines]
    assert [] == list(left_out(Arguments({"train_sampling_strategy": "random", "num_train_epochs": 1})))
    assert [] == list(left_out(Arguments({"num_train_epochs": 3, "max_steps": 1})))
    (line,) = left_out(Arguments({"num_train_epochs": 3}))
    assert "num_train_epochs 3 (epochs here are passes over each new file)" == line
    (line,) = left_out(Arguments({"train_sampling_strategy": "group_by_length", "num_train_epochs": 1}))
    assert line.startswith("train_sampling_strategy group_by_length (the order of rows is the run's own")
    assert [] == list(left_out(Arguments({"loss_type": "nll", "num_train_epochs": 1})))
    (line,) = left_out(Arguments({"loss_type": "dft", "num_train_epochs": 1}))
    assert "loss_type dft (a run's loss is the negative log-likelihood of the targets)" == line
    preferences = {"loss_type": ["sigmoid"], "beta": 0.1, "sample_packing": True, "num_train_epochs": 1}
    assert ["loss_type", "beta", "sample_packing"] == [line.split()[0] for line in left_out(Arguments(preferences))]


ROUTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "TRL, which adds what the config has": ("mixtral", {}, {"router_aux_loss_coef": None}, 0.001),
    "TRL, set": ("mixtral", {}, {"router_aux_loss_coef": 0.5}, 0.5),
    "TRL, set to nothing": ("mixtral", {"output_router_logits": True}, {"router_aux_loss_coef": 0.0}, 0.0),
    "TRL, no experts": ("llama", {}, {"router_aux_loss_coef": None}, 0.0),
    "a Trainer": ("mixtral", {}, {}, 0.0),
    "a Trainer whose model asks for it": ("mixtral", {"output_router_logits": True}, {}, 0.001),
}
"""A family, settings of its config, arguments, and the factor of the loss that was added."""


@pytest.mark.parametrize("case", ROUTERS)
def test_a_loss_of_routers_is_named(case: str, tmp_path: Path) -> None:
    """What a Trainer added to the loss of the rows of a mixture of experts is not taken, and said with its factor."""
    family, settings, values, factor = ROUTERS[case]
    small_config(family, **settings).save_pretrained(tmp_path)
    lines = list(router_loss(Arguments(values), tmp_path))
    assert [f"not taken: router_aux_loss_coef {factor:g}"] * bool(factor) == [line.split(" (")[0] for line in lines]


def stopped(
    folder: Path, kind: str, position: int, lag: int = 0, **settings: Any
) -> tuple[TrainerSchedule, list[float]]:
    """Return the schedule of a Trainer that stopped, and the rates of the steps that it had left."""
    arguments = saved_arguments(folder, lr_scheduler_type=kind, learning_rate=PEAK, **settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
    warmup, extra = arguments.warmup_steps(TOTAL), settings.get("lr_scheduler_kwargs")
    scheduler: Any = get_scheduler(kind, optimizer, warmup, TOTAL, extra)
    rates: list[float] = []
    for step in range(TOTAL - lag):
        if step == position:
            torch.save(scheduler.state_dict(), folder / "scheduler.pt")
        if step >= position:
            rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    state = {"global_step": position + lag, "max_steps": TOTAL}
    return read_schedule(TrainerFolder(folder, None, state), arguments, PEAK), rates


SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"warmup_steps": 6},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 2e-5}},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 1}},
    "polynomial": {"lr_scheduler_kwargs": {"power": 1.0, "lr_end": 1e-5}},
}


@pytest.mark.parametrize("lag", [0, 2], ids=["each step counted", "two steps skipped"])
@pytest.mark.parametrize("warmup", [0, 5, 0.2])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_learning_rates_go_on_as_the_trainers(kind: str, warmup: float, lag: int, tmp_path: Path) -> None:
    """Wherever it stopped, in its warmup too, each step that is left has the rate of transformers' own scheduler."""
    settings = {"warmup_steps": warmup, **SCHEDULES[kind]}
    for position in (1, 4, 8, TOTAL - 3):
        schedule, rates = stopped(tmp_path, kind, position, lag, **settings)
        values = schedule_settings(schedule)
        assert values is not None
        config = parse_config(values)
        first = position + lag + 1
        actual = [learning_rate(config, first + number, first + number) for number in range(len(rates))]
        beside = [schedule.rate(first + number) for number in range(len(rates))]
        assert rates == beside
        if kind in ("cosine_with_min_lr", "polynomial"):
            assert rates == pytest.approx(actual, rel=1e-9)
        else:
            assert rates == actual


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("polynomial", {"power": 2.0}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("warmup_stable_decay", {"num_decay_steps": 9}),
    ],
)
def test_another_schedule_is_not_taken_for_one_of_ours(kind: str, extra: dict[str, Any], tmp_path: Path) -> None:
    """A schedule that differs at any step that is left is none."""
    schedule, _ = stopped(tmp_path, kind, 4, warmup_steps=2, lr_scheduler_kwargs=extra)
    assert schedule_settings(schedule) is None
    assert schedule.rate(5) == pytest.approx(schedule.current)


def test_a_schedule_that_is_not_what_it_is_called_is_noticed(tmp_path: Path) -> None:
    """Where `scheduler.pt` stands elsewhere than the named schedule would, the name is not believed."""
    stopped(tmp_path, "linear", 8)
    arguments = saved_arguments(tmp_path, lr_scheduler_type="cosine", learning_rate=PEAK)
    folder = TrainerFolder(tmp_path, None, {"global_step": 8, "max_steps": TOTAL})
    schedule = read_schedule(folder, arguments, PEAK)
    assert "cosine in another form" == schedule.name
    assert schedule_settings(schedule) is None


def test_a_scheduler_that_is_no_function_of_the_step_is_read(tmp_path: Path) -> None:
    """A schedule that follows the loss has no rates ahead; where it stands is known."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, np.float64(2.0)):
        scheduler.step(loss)
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    arguments = saved_arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps")
    schedule = read_schedule(TrainerFolder(tmp_path, None, {"global_step": 2, "max_steps": TOTAL}), arguments, PEAK)
    assert (PEAK / 2, None) == (schedule.current, schedule_settings(schedule))
    assert (PEAK / 2, None) == (schedule.rate(3), schedule.rate(4))


def test_a_torn_scheduler_is_an_error(tmp_path: Path) -> None:
    """Half a file is not taken for a missing one."""
    (tmp_path / "scheduler.pt").write_bytes(b"PK half")
    with pytest.raises(DamagedState, match=r"scheduler\.pt cannot be read"):
        read_schedule(TrainerFolder(tmp_path, None, {"global_step": 2}), Arguments(), PEAK)


def test_a_finished_schedule_is_known_as_one(tmp_path: Path) -> None:
    """At the Trainer's last step nothing is left of a schedule that ends, and all of one that does not."""
    for kind, expected in (("linear", True), ("cosine", True), ("constant", False), ("inverse_sqrt", False)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=PEAK)
        scheduler: Any = get_scheduler(kind, optimizer, 3, TOTAL)
        for _ in range(TOTAL):
            optimizer.step()
            scheduler.step()
        torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
        arguments = saved_arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=3)
        folder = TrainerFolder(tmp_path, None, {"global_step": TOTAL, "max_steps": TOTAL})
        schedule = read_schedule(folder, arguments, PEAK)
        values = schedule_settings(schedule)
        assert values is not None
        assert (expected, kind) == (schedule.finished, values["schedule"])
