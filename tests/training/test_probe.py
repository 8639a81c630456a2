"""What the probe tells of a model: its loss, and gradients that an operation which repeats only forward gives away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rows import CPU, tiny_model
from torch import nn

from onward.errors import VerificationFailed
from onward.training.measuring.fingerprints import PIECE, ROW, Fingerprints, fingerprint, mixed_sum
from onward.training.measuring.handover import Measurement, compare, same_measurement
from onward.training.measuring.probe import Probe

BEFORE = Measurement("w", "m", 7, 1e-3, 2.0, "one")
HERE = {"device": "cpu", "threads": 2, "dtype": "float32"}
ELSEWHERE = {**HERE, "threads": 4}


class ExactForwardOnly(nn.Module):
    """A norm whose backward pass gives other last bits every time, as kernels do that add in any order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the norm returns."""
        out = self.inner(x)
        if out.requires_grad:
            out.register_hook(self._disturb)
        return out

    def _disturb(self, gradient: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return gradient * (1 + self.calls[0] * 2**-20)


def make_probe(*, repeats: bool) -> tuple[nn.Module, Probe]:
    """Return a model and its probe."""
    model: Any = tiny_model("llama", "sdpa")
    if not repeats:
        model.model.norm = ExactForwardOnly(model.model.norm)
    return model, Probe(model, 0, CPU, torch.float32)


def test_gradients_follow_from_the_weights() -> None:
    """Equal weights give equal digests, another weight another one, and the model's own gradients stay as they were."""
    model, probe = make_probe(repeats=True)
    first, again = probe.of_model(), probe.of_model()
    assert first == again
    assert [] == [name for name, weight in model.named_parameters() if weight.grad is not None]
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1.0
    assert first.gradient != probe.of_model().gradient


def test_a_kernel_that_is_exact_only_forward_is_found() -> None:
    """Its loss repeats and its gradients do not: that is no `bitwise` handover."""
    _, probe = make_probe(repeats=False)
    first, again = probe.of_model(), probe.of_model()
    assert first.loss == again.loss
    assert first.gradient != again.gradient
    before = replace(BEFORE, probe_gradient=first.gradient)
    with pytest.raises(VerificationFailed, match="gradient of the probe differs"):
        compare(before.to_dict(), replace(BEFORE, probe_gradient=again.gradient), HERE, HERE)


def test_gradients_decide_with_the_loss() -> None:
    """Elsewhere other gradients are `close`; measurements of earlier releases have none, and compare by the loss."""
    other = replace(BEFORE, probe_gradient="another")
    assert ("bitwise", 0.0) == compare(BEFORE.to_dict(), BEFORE, HERE, HERE)
    assert ("close", 0.0) == compare(BEFORE.to_dict(), other, ELSEWHERE, HERE)
    earlier = {key: value for key, value in BEFORE.to_dict().items() if key != "probe_gradient"}
    assert ("bitwise", 0.0) == compare(earlier, other, HERE, HERE)
    assert same_measurement(earlier, other.to_dict())
    assert not same_measurement(earlier, replace(other, probe_loss=3.0).to_dict())
    assert not same_measurement(BEFORE.to_dict(), other.to_dict())


def test_nothing_is_bitwise_where_no_bits_are_promised() -> None:
    """Without determinism a handover says so, on an Apple GPU it is `close` at most, whatever the probe found."""
    loose, apple = {**HERE, "deterministic": False}, {**HERE, "device": "mps"}
    near = replace(BEFORE, probe_loss=2.0002)
    for environments in ((loose, loose), (HERE, loose), (loose, HERE)):
        assert ("not deterministic", 0.0) == compare(BEFORE.to_dict(), BEFORE, *environments)
        assert "not deterministic" == compare(BEFORE.to_dict(), near, *environments)[0]
    assert ("close", 0.0) == compare(BEFORE.to_dict(), BEFORE, apple, apple)
    with pytest.raises(VerificationFailed, match="differs by"):
        compare(BEFORE.to_dict(), replace(BEFORE, probe_loss=9.0), loose, loose)
    with pytest.raises(VerificationFailed, match="weights"):
        compare(BEFORE.to_dict(), replace(BEFORE, weights="x"), loose, loose)


def test_a_sum_of_mixed_bits_tells_tensors_apart() -> None:
    """As made on a GPU: changes that cancel out in a plain sum do not, and no order of additions matters."""
    bits = torch.arange(-3, 70_000, dtype=torch.int32)
    moved = bits.clone()
    moved[5] += 1
    moved[9] -= 1
    assert bits.sum() == moved.sum()
    assert mixed_sum(bits) != mixed_sum(moved)
    assert mixed_sum(bits) == mixed_sum(bits.flip(0))
    assert 0 <= mixed_sum(bits.to(torch.int16)) < 1 << 64
    known = torch.tensor([1, -2, 3, 2**31 - 1], dtype=torch.int32)
    assert 2198267608170094593 == mixed_sum(known)  # runs on GPUs keep such digests and compare them after an update


def test_a_fingerprint_is_of_the_bits() -> None:
    """Zero and minus zero are equal numbers with other bits; a copy has the same ones."""
    values = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(values) != fingerprint(values.where(values != 0, -values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_that_are_mixed_together_have_the_sums_of_each_alone(dtype: torch.dtype) -> None:
    """Whatever their sizes and types, and however many: as `mixed_sum` gives it of the bits of one."""
    torch.manual_seed(0)
    sizes = [(0,), (1,), (ROW - 1,), (ROW,), (ROW + 1,), (3, 5), (PIECE // 4 + 1,), (7,)]
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    together, alone = Fingerprints(home="cuda"), {}
    for place, size in enumerate(sizes):
        gradient = torch.randn(size).to(dtype if place % 4 else torch.float32)
        together.add(str(place), gradient)
        bits = gradient.reshape(-1).view(width if place % 4 else torch.int32)
        alone[str(place)] = f"{mixed_sum(bits):016x}"
    assert alone == together.by_name()
