"""Memory, cores and instruction sets, read from trees that stand for machines and containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.ops import host

GIB = 1 << 30
UNLIMITED_V1 = str(2**63 - 4096)


def write(root: Path, **files: str) -> Path:
    """Lay out files; "/" in a name separates folders."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root: Path, available: int, groups: str) -> Path:
    meminfo = f"MemTotal: {available // 512} kB\nMemAvailable: {available // 1024} kB\n"
    return write(root, **{"proc/meminfo": meminfo, "proc/self/cgroup": groups})


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
class TestWithoutLimits:
    def test_the_machine_counts(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, "0::/\n")
        assert host.available_memory(tmp_path) == 8 * GIB
        assert host.usable_cores(tmp_path) == 8

    def test_without_proc_physical_memory_counts(self, tmp_path: Path) -> None:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert host.available_memory(tmp_path) == physical
        assert host.usable_cores(tmp_path) == 8


@pytest.mark.usefixtures("eight_cores")
class TestVersion2:
    def test_limit_less_usage_with_droppable_cache(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, "0::/box\n")
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/box/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/box/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
        )
        assert host.available_memory(tmp_path) == 2 * GIB

    def test_the_tightest_ancestor_counts(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, "0::/pod/box\n")
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/pod/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/pod/memory.current": "0\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
            },
        )
        assert host.available_memory(tmp_path) == GIB
        assert host.usable_cores(tmp_path) == 2

    def test_a_container_sees_its_group_as_the_root(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, "0::/outside/name\n")
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/cpu.max": "max 100000\n",
            },
        )
        assert host.available_memory(tmp_path) == GIB
        assert host.usable_cores(tmp_path) == 8

    def test_a_group_over_its_limit_has_nothing_left(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, "0::/box\n")
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/box/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/box/memory.current": f"{2 * GIB}\n",
            },
        )
        assert host.available_memory(tmp_path) == 0


@pytest.mark.usefixtures("eight_cores")
class TestVersion1:
    GROUPS = "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n"

    def test_limits(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, self.GROUPS)
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{3 * GIB}",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}",
                "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {GIB // 2}\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
        )
        assert host.available_memory(tmp_path) == 3 * GIB // 2
        assert host.usable_cores(tmp_path) == 1

    def test_no_limits(self, tmp_path: Path) -> None:
        machine(tmp_path, 8 * GIB, self.GROUPS)
        write(
            tmp_path,
            **{
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": UNLIMITED_V1,
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
        )
        assert host.available_memory(tmp_path) == 8 * GIB
        assert host.usable_cores(tmp_path) == 8


def test_affinity_is_below_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    machine(tmp_path, GIB, "0::/box\n")
    write(tmp_path, **{"sys/fs/cgroup/box/cpu.max": "400000 100000\n"})
    assert host.usable_cores(tmp_path) == 1


def test_processor(tmp_path: Path) -> None:
    text = (
        "processor : 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor : 1\n"
    )
    write(
        tmp_path,
        **{
            "proc/cpuinfo": text,
            "sys/devices/system/cpu/cpu0/cache/index0/size": "32K\n",
            "sys/devices/system/cpu/cpu0/cache/index3/size": "32M\n",
        },
    )
    assert host.cpu_name(tmp_path) == "Some CPU"
    assert host.isa_features(tmp_path) == {"fpu", "avx2", "avx512_vnni"}
    assert host.last_level_cache(tmp_path) == 32 << 20


def test_an_arm_processor_lists_features(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/cpuinfo": "Features\t: fp asimd i8mm\n"})
    assert host.isa_features(tmp_path) == {"fp", "asimd", "i8mm"}
    assert host.cpu_name(tmp_path) == "unknown processor"
    assert host.last_level_cache(tmp_path) == 0
