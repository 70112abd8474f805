"""What the host gives this process: memory, cores, instruction sets. Reads files; no torch.

Every function takes ``root``, the directory under which ``proc`` and ``sys`` are found. Limits of
control groups (v1 and v2) count: in a container the machine's own figures are not ours to use.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60
"""v1 says "no limit" by a number near 2**63."""


def available_memory(root: Path = ROOT) -> int:
    """Bytes this process may still take: the machine's, cut to what its control groups leave.

    File cache that the kernel can drop counts as free.
    """
    room = [_machine_memory(root)]
    room.extend(_memory_room(group) for group in _groups(root, "memory"))
    return max(0, min(room))


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may keep busy: its affinity, cut to the control groups' quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [_core_quota(group) for group in _groups(root, "cpu")]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def isa_features(root: Path = ROOT) -> frozenset[str]:
    """The processor's feature flags as the kernel spells them ("avx512_vnni", "amx_bf16", ...)."""
    flags = _cpu_field(root, "flags") or _cpu_field(root, "Features")
    return frozenset(flags.split())


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name."""
    return _cpu_field(root, "model name") or "unknown processor"


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache of the first core; 0 when the kernel does not say."""
    sizes = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [path.read_text().strip() for path in sizes]
    return max(
        (int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0
    )


def has_gpu_driver(root: Path = ROOT) -> bool:
    """Whether the kernel runs a GPU driver that torch could use."""
    return any((root / path).exists() for path in ("proc/driver/nvidia/version", "dev/kfd"))


def _machine_memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_field(root: Path, field: str) -> str:
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of the control groups that bound ``controller``: ours and its ancestors.

    A container may see its own group mounted as the root while ``/proc/self/cgroup`` still names
    the path outside, so ancestors are tried down to the mount itself.
    """
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / controller, mount / controllers]
        else:
            continue
        for base in dict.fromkeys(bases):
            group = base / path.strip("/")
            yield from (d for d in (group, *group.parents) if d.is_relative_to(base) and d.is_dir())


def _memory_room(group: Path) -> int:
    """Bytes between a group's limit and what it uses; unlimited when it has no limit."""
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _integer(_text(group / limit_name))
        if limit is not None and limit < _UNLIMITED:
            usage = _integer(_text(group / usage_name)) or 0
            return limit - usage + _statistic(group / "memory.stat", cache_name)
    return _UNLIMITED


def _core_quota(group: Path) -> float | None:
    """Cores' worth of time a group may use, or ``None`` when it is not limited."""
    fields = _text(group / "cpu.max").split()
    if len(fields) == 2:
        quota, period = _integer(fields[0]), _integer(fields[1])
    else:
        quota = _integer(_text(group / "cpu.cfs_quota_us"))
        period = _integer(_text(group / "cpu.cfs_period_us"))
    if quota is None or quota <= 0 or not period:
        return None
    return quota / period


def _statistic(path: Path, name: str) -> int:
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
