"""The memory that a process may take, by what the kernel says of the machine and of cgroups."""

from pathlib import Path

import pytest

from serving.engine.kv_cache_size import Memory
from serving.engine_process.machine_memory import memory

GIB = 1 << 30


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_limits_what_is_free(tmp_path: Path, version: int) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    inner = groups / ("memory/pod/c" if version == 1 else "pod/c")
    (proc / "self").mkdir(parents=True)
    inner.mkdir(parents=True)
    (proc / "meminfo").write_text(
        "MemTotal: 33554432 kB\nMemFree: 1 kB\nMemAvailable: 16777216 kB\n"
    )
    (proc / "self/cgroup").write_text("4:memory:/pod/c\n0::/\n" if version == 1 else "0::/pod/c\n")
    assert memory(proc, groups) == Memory(16 * GIB, 32 * GIB)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    files = "total_inactive_file" if version == 1 else "inactive_file"
    figures = {names[0]: 6 * GIB, names[1]: 2 * GIB, "memory.stat": f"anon 1\n{files} {GIB}\n"}
    for name, value in figures.items():
        (inner / name).write_text(str(value))
        (inner.parent / name).write_text(str(value))
    (inner.parent / names[0]).write_text(str(7 * GIB))
    (inner.parent / names[1]).write_text(str(3 * GIB))
    assert memory(proc, groups) == Memory(5 * GIB, 6 * GIB)
    (inner / names[0]).write_text("max" if version == 2 else "9223372036854771712")
    assert memory(proc, groups) == Memory(5 * GIB, 7 * GIB)


def test_this_machines_memory_is_known() -> None:
    seen = memory()
    assert 0 < seen.free_bytes <= seen.total_bytes
