"""Compiles the emulated device for the installed PyTorch."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent


def build(folder: Path) -> None:
    """Compile the device into a folder.

    Raises:
        subprocess.CalledProcessError: the compiler refuses it.
    """
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = ["c++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", abi, "-DTORCH_EXTENSION_NAME=emulated_device"]
    places = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    for source, target, needs in (("early", "early", []), ("device", "emulated_device", libraries)):
        output = str(folder / f"{target}.so")
        subprocess.run([*common, *places, str(HERE / f"{source}.cpp"), "-o", output, *needs, "-ldl"], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
