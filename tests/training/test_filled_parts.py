"""Parts that are filled up to sizes that come again, and nothing of which is left to the host: they can be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_call import let_attend_in_one_call
from op_recorder import OpRecorder
from rows import CPU, WINDOWED, batch, tiny_model

from onward.training.layers.attention import PADDING_FREE, lay_end_to_end
from onward.training.layers.recording import Watch
from onward.training.steps.loss import TargetLoss
from onward.training.steps.sizes import LEAST, Sizes


@pytest.fixture(autouse=True)
def _one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    let_attend_in_one_call(monkeypatch)


def test_a_part_that_is_filled_up_trains_the_same() -> None:
    """The row and the targets that fill it up change neither loss nor gradients, but for rounding."""
    model: Any = tiny_model("llama", "sdpa")
    lay_end_to_end(model)
    loss_of = TargetLoss(model, CPU, torch.float32)
    rows = batch(9, 2, 17, 6)
    filled = loss_of.filled(rows, rows.weight)
    assert Sizes(LEAST, LEAST // 4, 8, LEAST) == filled.sizes  # type: ignore[union-attr]
    assert (LEAST, LEAST // 4) == (len(filled.ids), len(filled.before))  # type: ignore[union-attr]
    assert [9, 2, 17, 6, LEAST - 34] == list(filled.rows["row_lengths"])  # type: ignore[union-attr]
    found: list[dict[str, torch.Tensor]] = []
    for loss in (loss_of(rows) / rows.weight, loss_of(filled) * filled.share):  # type: ignore[union-attr]
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", [*sorted(PADDING_FREE), "granite", "glm", "helium", "olmo", "exaone4"])
def test_nothing_of_a_step_is_left_to_the_host(model_type: str) -> None:
    """Its operations alone, run again on the same memory for rows of other lengths, give their loss and gradients."""
    model: Any = tiny_model(model_type, "sdpa", **({"sliding_window": 5} if model_type in WINDOWED else {}))
    lay_end_to_end(model)
    loss_of = TargetLoss(model, CPU, torch.float32)

    def computed(rows: Any) -> list[torch.Tensor]:
        loss = loss_of(rows) * rows.share
        loss.backward()
        gradients = [weight.grad for weight in model.parameters()]
        model.zero_grad()
        return [loss.detach(), *gradients]

    rows: list[Any] = [
        loss_of.filled(batch(*lengths, seed=place), 7.0) for place, lengths in enumerate(((30, 4), (9, 3, 22)))
    ]
    assert rows[0].sizes == rows[1].sizes
    inputs = rows[0].copied()
    with Watch(CPU) as watch:
        computed(inputs)
    assert "" == watch.hindrance
    replay = OpRecorder()(lambda: computed(inputs))
    for target, source in zip(inputs.tensors, rows[1].tensors, strict=True):
        target.copy_(source)
    assert all(map(torch.equal, computed(rows[1]), replay()))
