"""Files past the page cache, and slots that are filled ahead of their use."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from headrace.disk import ALIGNMENT, DiskFile, Rotation, align, aligned_memory, measure_reading


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = DiskFile.scratch(tmp_path, 3 * ALIGNMENT)
    assert list(tmp_path.iterdir()) == [], "nobody else sees it"
    file.reserve(3 * ALIGNMENT)
    file.bypass_cache()
    memory = aligned_memory(2 * ALIGNMENT)
    memory[:] = bytes(range(256)) * (len(memory) // 256)
    file.write(memory, ALIGNMENT)
    found = aligned_memory(2 * ALIGNMENT)
    file.read(found, ALIGNMENT)
    assert bytes(found) == bytes(memory)
    file.read(found, 0)
    assert bytes(found[:ALIGNMENT]) == bytes(ALIGNMENT)
    with pytest.raises(OSError, match=f"ends at {3 * ALIGNMENT} bytes, too early"):
        file.read(found, 2 * ALIGNMENT)
    file.close()
    file.close()


@pytest.mark.parametrize("direct", [True, False])
def test_the_end_of_a_file_need_not_be_aligned(tmp_path: Path, direct: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (ALIGNMENT + 100))
    file = DiskFile.open(path, direct)
    memory = aligned_memory(2 * ALIGNMENT)
    file.read(memory, 0, least=ALIGNMENT + 100)
    assert bytes(memory).rstrip(b"\0") == path.read_bytes()
    with pytest.raises(OSError, match="too early"):
        file.read(memory, 0, least=ALIGNMENT + 101)
    file.close()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere cannot be written: No such file"):
        DiskFile.scratch(tmp_path / "nowhere", 1)
    with pytest.raises(ValueError, match=r"GB have to go into .*, where .* GB are free; make room"):
        DiskFile.scratch(tmp_path, 1 << 60)
    assert measure_reading(tmp_path, direct=False) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return 0

    monkeypatch.setattr("fcntl.fcntl", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=r"O_DIRECT.*; name another directory, or set direct=fal"):
        measure_reading(tmp_path, direct=True)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{path}: its file system does not read past the page"):
        DiskFile.open(path, direct=True)
    assert len(os.listdir("/proc/self/fd")) == len(before), "a file is left open"


def test_alignment() -> None:
    assert [align(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, 4096, 4096, 8192]


@pytest.fixture
def filled() -> list[tuple[int, int]]:
    """(slot, item) as they are filled."""
    return []


class Guard:
    """Slots that know what they hold; filling one that is in use is a mistake."""

    def __init__(self, slots: int, bad: int = -1, delay: float = 0.0) -> None:
        self.holds: list[int | None] = [None] * slots
        self.used: set[int] = set()
        self.bad, self.delay, self.started = bad, delay, 0

    def fill(self, slot: int, item: int) -> None:
        assert slot not in self.used, "a slot is filled while it is in use"
        self.started += 1
        time.sleep(self.delay)
        if item == self.bad:
            raise OSError("bad")
        self.holds[slot] = item


@pytest.fixture(params=[1, 2, 3])
def slots(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=[True, False], ids=["ahead", "when taken"])
def ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def rotate(guard: Guard, slots: int, ahead: bool) -> Rotation[int]:
    return Rotation(slots, guard.fill, ahead, "headrace-test")


def pass_through(rotation: Rotation[int], guard: Guard, items: int) -> Iterator[int | None]:
    """Take and give back in turn; what slots hold while they are taken."""
    for _ in range(items):
        slot = rotation.take()
        guard.used.add(slot)
        held = guard.holds[slot]
        time.sleep(0.001)
        assert guard.holds[slot] == held, "a slot is filled while it is in use"
        yield held
        guard.used.remove(slot)
        rotation.give()


def test_items_come_in_order(slots: int, ahead: bool) -> None:
    guard = Guard(slots)
    rotation = rotate(guard, slots, ahead)
    for start in (0, 100):
        rotation.start(count(start))
        assert list(pass_through(rotation, guard, 20)) == list(range(start, start + 20))
    rotation.start(range(3))
    assert list(pass_through(rotation, guard, 3)) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="there is no item left"):
        rotation.take()
    rotation.close()
    assert "headrace-test" not in {thread.name for thread in threading.enumerate()}


def test_slots_are_filled_ahead_and_no_further() -> None:
    guard = Guard(3)
    rotation = rotate(guard, 3, True)
    rotation.start(count())
    rotation.take()
    deadline = time.monotonic() + 10
    while guard.started < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert guard.started == 3 and guard.holds == [0, 1, 2]
    rotation.give()
    while guard.started < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    rotation.close()
    assert guard.holds == [3, 1, 2]


def test_a_failure_is_raised_where_its_item_is_taken(slots: int, ahead: bool) -> None:
    guard = Guard(slots, bad=2)
    rotation = rotate(guard, slots, ahead)
    rotation.start(range(9))
    assert list(pass_through(rotation, guard, 2)) == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="bad"):
            rotation.take()
    rotation.start(range(5, 9))
    assert list(pass_through(rotation, guard, 4)) == [5, 6, 7, 8]
    rotation.close()


def test_stopping_waits_for_what_is_being_filled(slots: int) -> None:
    guard = Guard(slots, delay=0.02)
    rotation = rotate(guard, slots, True)
    rotation.start(range(50))
    rotation.take()
    rotation.stop()
    started = guard.started
    time.sleep(0.05)
    assert guard.started == started <= 1 + slots
    rotation.start(range(70, 72))
    assert list(pass_through(rotation, guard, 2)) == [70, 71]
    rotation.close()
    with pytest.raises(RuntimeError):
        rotation.take()
