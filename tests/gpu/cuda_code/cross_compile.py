"""Compiles a case for some generations of GPUs on a machine without one, and prints what became of
it.

    python -m tests.gpu.cuda_code.cross_compile LIBRARY FOLDER CASE ARCH [ARCH ...]

LIBRARY is `fake_cuda.cpp`, compiled; FOLDER holds what is made on the way. TorchInductor writes the
kernels as it would on the GPU, Triton and `ptxas` compile each of their configurations, and nothing
runs. Prints a JSON list of `Compiled`. Needs Triton's wheel beside a PyTorch without CUDA.
"""

import ast
import ctypes
import importlib.util
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])  # before PyTorch asks which devices there are

import torch
import triton
import triton.backends.nvidia
from torch._inductor.graph import GraphLowering

from tests.gpu.cuda_code import planted
from tests.gpu.cuda_code.cases import CASES, PLANTED
from tests.gpu.cuda_code.report import Compiled, Written, inspected_kernels
from tests.gpu.cuda_code.targets import TARGETS, pretend

MOST_BYTES = 24 << 30  # of addresses, of one process

_NOT_WRITTEN = re.compile(r"(?:extern_kernels|torch\.ops\.\w+)\.(\w+)")


@contextmanager
def _programs() -> Iterator[list[str]]:
    """Lasts while the compiler writes programs, which come into the list and are not run: what each
    would return is made with its shape alone."""
    programs: list[str] = []

    def compile_to_module(graph: Any) -> SimpleNamespace:
        program, _ = graph.codegen()
        programs.append(program.value)
        outputs = [out.maybe_get_layout() for out in graph.graph_outputs]
        return SimpleNamespace(call=partial(_returned, outputs), __file__="", runner=None)

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield programs


def _returned(layouts: list[Any], arguments: list[Any]) -> list[Any]:
    arguments.clear()
    returned: list[Any] = []
    for layout in layouts:
        if layout is None:
            returned.append(None)
            continue
        size, stride = ([int(n) for n in side] for side in (layout.size, layout.stride))
        returned.append(torch.empty_strided(size, stride, dtype=layout.dtype, device=layout.device))
    return returned


def calls_of(program: str) -> tuple[dict[str, str], Counter[str]]:
    """Returns the sources of the kernels that a program has, by name, and how often it calls what
    the compiler did not write."""
    kernels: dict[str, str] = {}
    others: Counter[str] = Counter()
    for node in ast.walk(ast.parse(program)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "async_compile.triton":
            kernel, source = (ast.literal_eval(argument) for argument in node.args[:2])
            kernels[kernel] = source
        elif called := _NOT_WRITTEN.match(name):
            others[called[1]] += 1
    return kernels, others


def _compiled_kernel(name: str, source: str, path: Path) -> Written:
    path.write_text(source, encoding="utf-8")
    os.utime(path, (0, 0))  # ptxas writes it beside the numbers of lines
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuner = getattr(module, name)
    num_configurations = len(tuner.configs)
    tuner.precompile(warm_cache_only=True)
    return Written(
        name=name,
        heuristic=tuner.heuristic_type.name,
        has_product="tl.dot" in source,
        is_settled=tuner.deterministic_mode,
        num_configurations=num_configurations,
        cubins=[made.kernel.asm["cubin"] for made in tuner.compile_results],
    )


def compile_case(case: Callable[[], None], folder: Path) -> tuple[int, Counter[str], list[Written]]:
    """Returns the number of programs that the compiler writes for a case, what they call that it
    did not write, and the kernels that it wrote."""
    with _programs() as programs:
        case()
    kernels: list[Written] = []
    others: Counter[str] = Counter()
    for number, program in enumerate(programs):
        sources, called = calls_of(program)
        others += called
        for name, source in sources.items():
            path = folder / f"program_{number}_{name}.py"
            kernels.append(_compiled_kernel(name, source, path))
    return len(programs), others, kernels


def _versions(arch: int) -> dict[str, str]:
    """Returns the versions of what compiles. Triton has a `ptxas` of its own for Blackwell."""
    name = "ptxas-blackwell" if arch >= 100 else "ptxas"
    ptxas = Path(str(triton.backends.nvidia.__file__)).parent / "bin" / name
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    [release] = re.findall(r"\bV([\d.]+)", said)
    return {"torch": torch.__version__, "triton": triton.__version__, "ptxas": release}


def _compile_for(case: str, arch: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    pretend(TARGETS[arch])
    chosen = planted.not_deterministic if case == PLANTED else CASES[case]
    num_programs, others, kernels = compile_case(chosen, folder)
    if case == PLANTED:
        kernels += planted.written_kernels(arch)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    compiled = Compiled(
        case=case,
        arch=arch,
        num_programs=num_programs,
        others=dict(sorted(others.items())),
        kernels=inspected_kernels(kernels, arch),
        processor_s=sum(one.ru_utime + one.ru_stime for one in used),
        memory_mib=max(one.ru_maxrss for one in used) / 1024,
        versions=_versions(arch),
    )
    (folder / "compiled.json").write_text(compiled.model_dump_json(), encoding="utf-8")


def compile_for(case: str, arch: int, folder: Path) -> str:
    """Compiles a case for one generation, in a process of its own: PyTorch remembers which GPU it
    has. Returns `Compiled` as JSON."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ |= {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    process = multiprocessing.get_context("fork").Process(
        target=_compile_for, args=(case, arch, folder)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(
            f"{case} for sm_{arch}: the process that compiles it ended with {process.exitcode}"
        )
    return (folder / "compiled.json").read_text(encoding="utf-8")


if __name__ == "__main__":
    folder, case, archs = Path(sys.argv[2]), sys.argv[3], [int(arch) for arch in sys.argv[4:]]
    print(f"[{', '.join(compile_for(case, arch, folder / str(arch)) for arch in archs)}]")
