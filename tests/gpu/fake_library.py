"""Compiles `fake_cuda.cpp`, with which a PyTorch without CUDA takes this machine to have a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.time_limits import limit_s


def fake_cuda_library(folder: Path) -> Path:
    """Returns the library, in the folder. Skips the test where it cannot be made, or where a real
    GPU proves more."""
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA: `make test-gpu` proves more")
    if shutil.which("g++") is None:
        pytest.skip(
            "no g++ on this machine, which compiles what lets PyTorch take itself to have a GPU"
        )
    library, torch_folder = folder / "fake_cuda.so", Path(torch.__file__).parent
    places = [
        f"-I{torch_folder}/include",
        f"-L{torch_folder}/lib",
        f"-Wl,-rpath,{torch_folder}/lib",
    ]
    source = Path(__file__).with_name("fake_cuda.cpp")
    settings = ["-shared", "-fPIC", "-O0", "-std=c++20"]
    libraries = ["-lc10", "-ltorch_cpu"]
    command = ["g++", *settings, str(source), "-o", str(library), *places, *libraries]
    subprocess.run(command, check=True, timeout=limit_s(60))
    return library
