"""What an older release of PyTorch lacks is said before anything is computed."""

from __future__ import annotations

import pytest

from onward.errors import ConfigError
from onward.training.device.support import require_support


class Old:
    """A class of an older release."""

    def get(self) -> None:
        """Something that it had then."""


def test_what_a_release_lacks_is_named() -> None:
    """The methods that are missing, where they are asked for, and what to do: upgrade, or do without."""
    require_support("this", {Old: ("get",)}, where="devices", instead="train on one")
    said = r"^this needs a newer PyTorch: .* has no Old\.clone and no Old\.wait "
    with pytest.raises(ConfigError, match=said) as refusal:
        require_support("this", {Old: ("clone", "get", "wait")}, where="devices", instead="train on one")
    assert ("devices", "pip install -U torch, or train on one.") == (refusal.value.where, refusal.value.hint)
