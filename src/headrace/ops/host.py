"""What the host gives this process: memory, cores, instruction sets. Reads files; no torch.

Every function takes ``root``, the directory under which ``proc`` and ``sys`` are found. Limits of
control groups (v1 and v2) count: in a container the machine's own figures are not ours to use.
"""

from __future__ import annotations

import math
import os
import re
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
    kilobytes = _number(_field(root / "proc/meminfo", "MemAvailable"))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = physical if kilobytes is None else kilobytes * 1024
    return max(0, min([room, *map(_memory_room, _groups(root, "memory"))]))


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may keep busy: its affinity, cut to the control groups' quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, math.ceil(min([cores, *map(_core_quota, _groups(root, "cpu"))])))


def isa_features(root: Path = ROOT) -> frozenset[str]:
    """The processor's feature flags as the kernel spells them ("avx512_vnni", "amx_bf16", ...)."""
    info = root / "proc/cpuinfo"
    return frozenset((_field(info, "flags") or _field(info, "Features")).split())


def cpu_name(root: Path = ROOT) -> str:
    """The processor's name."""
    return _field(root / "proc/cpuinfo", "model name") or "unknown processor"


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache of the first core; 0 when the kernel does not say."""
    sizes = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 10, "M": 20}
    texts = [_text(path).strip() for path in sizes]
    return max((int(text[:-1]) << units[text[-1]] for text in texts if text), default=0)


def has_gpu_driver(root: Path = ROOT) -> bool:
    """Whether the kernel runs a GPU driver that torch could use."""
    return any((root / path).exists() for path in ("proc/driver/nvidia/version", "dev/kfd"))


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
        limit = _number(_text(group / limit_name))
        if limit is not None and limit < _UNLIMITED:
            cache = _number(_field(group / "memory.stat", cache_name)) or 0
            return limit - (_number(_text(group / usage_name)) or 0) + cache
    return _UNLIMITED


def _core_quota(group: Path) -> float:
    """Cores' worth of time a group may use; infinite when it is not limited."""
    v1 = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
    limit = re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", _text(group / "cpu.max") or v1)
    return int(limit[1]) / int(limit[2]) if limit else math.inf


def _field(path: Path, name: str) -> str:
    """The value of the first line "name: value" or "name value"; empty if there is none."""
    match = re.search(rf"^{name}(?:[ \t]*:|[ \t])[ \t]*(.*)$", _text(path), re.MULTILINE)
    return match[1].strip() if match else ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None
