"""Makes every process with this folder on its path see an emulated GPU as soon as it has imported PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterTorch:
    """Finds PyTorch like everybody else; what is loaded is followed by `face.show`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return PyTorch's spec, once."""
        del path, target
        if name != "torch":
            return None
        sys.meta_path.remove(AfterTorch)
        spec = importlib.util.find_spec("torch")
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            import face

            face.show()

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AfterTorch)
