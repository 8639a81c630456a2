"""The handover: proof that the state after a boundary or a resume is the state before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from onward.digest import state_digest
from onward.errors import VerificationFailed
from onward.training.device.environment import promises_bits, same_environment
from onward.training.measuring.probe import Probed
from onward.training.state import Snapshot

GRADIENT = "probe_gradient"

CLOSE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""The relative difference of the probe loss up to which two environments count as close, by compute type."""

HandoverClass = Literal["bitwise", "close", "not comparable", "not deterministic"]


@dataclass(frozen=True)
class Measurement:
    """A state as measured: digests of weights and moments, Adam's counter, learning rate, and the probe.

    Args:
        probe_loss: mean loss of the probe (nats).
        probe_gradient: digest of the gradients of that loss; empty in measurements of earlier releases.
    """

    weights: str
    moments: str
    adam_step: int
    learning_rate: float
    probe_loss: float
    probe_gradient: str = ""

    @property
    def state_digest(self) -> str:
        """One digest for weights, moments and Adam's counter together."""
        return state_digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON values."""
        return asdict(self)


def measure(snapshot: Snapshot, probed: Probed) -> Measurement:
    """Return the measurement of a state whose probe was computed."""
    digest = snapshot.digest()
    return Measurement(
        digest.weights, digest.moments, snapshot.adam_step(), snapshot.learning_rate, probed.loss, probed.gradient
    )


def class_of_equal(environment: Mapping[str, Any]) -> HandoverClass:
    """Return the class of a handover whose two sides are equal, both measured in this environment."""
    either = Measurement("", "", 0, 0.0, 0.0)
    return compare(either.to_dict(), either, environment, environment)[0]


def compare(
    before: Mapping[str, Any], after: Measurement, environment_before: Mapping[str, Any], environment: Mapping[str, Any]
) -> tuple[HandoverClass, float]:
    """Return the class of a handover between two measurements, and the relative difference of their probe losses.

    Weights, moments, Adam's counter and the learning rate must always be equal; the probe's loss and gradients must be
    equal in the same environment, and its loss close in another one with the same compute type. If equal bits are not
    promised, the class is never `bitwise`, whatever the probe says.

    Raises:
        VerificationFailed: the state after differs from the state before.
    """
    here = after.to_dict()
    changed = [key for key in ("weights", "moments", "adam_step", "learning_rate") if here[key] != before[key]]
    if changed:
        raise _difference(", ".join(f"{key}: {before[key]} before, {here[key]} after" for key in changed))
    both = (environment_before, environment)
    promised = all(map(promises_bits, both))
    repeated = same_measurement(before, here)
    if promised and repeated:
        return "bitwise", 0.0
    if promised and same_environment(*both):
        raise _not_repeated(before, here)
    difference = abs(here["probe_loss"] - before["probe_loss"]) / max(abs(before["probe_loss"]), 1e-12)
    if environment_before["dtype"] != environment["dtype"]:
        return "not comparable", difference
    if difference > CLOSE[environment["dtype"]]:
        raise _difference(f"the probe loss differs by {difference:.1e} (relative) from another environment's")
    was_exact = all(each.get("deterministic", True) for each in both)
    return "close" if was_exact else "not deterministic", difference


def same_measurement(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Return whether two measurements are equal in everything that both have: earlier releases measured no gradient."""
    unsaid = {GRADIENT} if not (before.get(GRADIENT) and after.get(GRADIENT)) else set[str]()
    return all(before.get(key) == after.get(key) for key in (before.keys() | after.keys()) - unsaid)


def _not_repeated(before: Mapping[str, Any], here: Mapping[str, Any]) -> VerificationFailed:
    if before["probe_loss"] != here["probe_loss"]:
        return VerificationFailed(
            "weights and moments are those before the stop, but the model computes another loss with them: the probe's "
            f"was {before['probe_loss']!r} and is {here['probe_loss']!r}",
            where="handover",
            hint="Nothing was trained on it. Undo what changed since: a library, a setting of the machine. To go on "
            "without the promise of equal bits: deterministic: false in onward.yaml.",
        )
    return VerificationFailed(
        "the gradient of the probe differs from that before the stop, although weights and loss are equal",
        where="handover",
        hint="The backward pass of this model is not reproducible here. Nothing was trained on it. To go on without "
        "the promise of equal bits: deterministic: false in onward.yaml.",
    )


def _difference(reason: str) -> VerificationFailed:
    return VerificationFailed(
        f"the state after the stop is not the state before it: {reason}",
        where="handover",
        hint="Nothing was trained on it. onward verify looks closer; onward rollback --to FILE goes back.",
    )
