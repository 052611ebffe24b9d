"""How much memory this process may take: what the machine has, or the cgroups around it allow."""

from pathlib import Path

from serving.engine.kv_cache_size import Memory

_NO_LIMIT_BYTES = 1 << 60  # cgroups write larger numbers for none


def memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Returns the machine's memory, or less where a cgroup of this process, or one around it, has
    less. What files hold in memory is free, as the kernel takes it back."""
    lines = (proc / "meminfo").read_text().splitlines()
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    free, total = kilobytes["MemAvailable"] << 10, kilobytes["MemTotal"] << 10
    for limit, used, files in _limits(proc, cgroups):
        if limit < min(total, _NO_LIMIT_BYTES):
            total = limit
        free = min(free, max(0, limit - used + files))
    return Memory(free, total)


def _limits(proc: Path, cgroups: Path) -> list[tuple[int, int, int]]:
    """Returns limit, use, and what files have of it, in bytes, of each memory cgroup of this
    process and of those around it."""
    limits = []
    for line in (
        (proc / "self/cgroup").read_text().splitlines() if (proc / "self/cgroup").exists() else []
    ):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroups
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if (limit := _limit(place, *names)) is not None:
                limits.append(limit)
            if place == root:
                break
    return limits


def _limit(
    place: Path, max_name: str, used_name: str, files_name: str
) -> tuple[int, int, int] | None:
    """Returns a cgroup's figures; None where it has no limit, or is not visible in this
    container."""
    try:
        limit = (place / max_name).read_text().strip()
        used = int((place / used_name).read_text())
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max" or int(limit) >= _NO_LIMIT_BYTES:
        return None
    return int(limit), used, int(stat.get(files_name, 0))
