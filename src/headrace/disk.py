"""Files past the page cache, and slots of memory that a thread fills ahead of their use."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")

ALIGNMENT = 4096
"""Bytes: memory, offsets and lengths of reads and writes past the page cache are multiples."""

_AT_ONCE = 8 << 20
"""Bytes of one read: enough to keep a disk busy, few enough to be interrupted soon."""


_MEASURED = 4 * _AT_ONCE


@dataclass(frozen=True, slots=True)
class FilePlace:
    """Where bytes lie in a file."""

    path: Path
    offset: int
    num_bytes: int


def align(count: int) -> int:
    """``count`` bytes, up to where the next aligned thing may begin."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def return_freed_memory() -> None:
    """Let the system have what the C library keeps of memory that was freed, where it keeps any."""
    library = ctypes.CDLL(None)
    try:
        trim = library.malloc_trim
    except AttributeError:
        return
    trim(0)


def aligned_memory(size: int) -> memoryview:
    """Memory of its own that begins at a multiple of ``ALIGNMENT`` and is not touched yet."""
    return memoryview(mmap.mmap(-1, max(align(size), ALIGNMENT)))


class DiskFile:
    """A file that is read and written where its bytes lie.

    Args:
        descriptor: of the open file, which is closed with this.
        name: for error messages.

    Raises:
        OSError: of every operation, as the system says it; a file that ends too early is one.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    @classmethod
    def open(cls, path: Path, direct: bool) -> DiskFile:
        """A file to read. ``direct``: past the page cache, or ValueError if that cannot be."""
        file = cls(os.open(path, os.O_RDONLY), str(path))
        if direct:
            file.bypass_cache()
        return file

    @classmethod
    def scratch(cls, directory: Path, size: int) -> DiskFile:
        """A new file that nobody else sees and that is gone when it is closed, however that ends.

        Args:
            size: bytes that it will have; refused if the disk has no room for them.

        Raises:
            ValueError: the directory cannot be written, or has no room.
        """
        try:
            free = shutil.disk_usage(directory).free
            if size > free:
                raise ValueError(
                    f"{size / 1e9:.1f} GB have to go into {directory}, where {free / 1e9:.1f} GB "
                    "are free; make room, or name another directory"
                )
            descriptor, name = tempfile.mkstemp(prefix="headrace-", dir=directory)
            os.unlink(name)
        except OSError as error:
            raise ValueError(f"{directory} cannot be written: {error.strerror}") from error
        return cls(descriptor, f"a file in {directory}")

    def reserve(self, size: int) -> None:
        """Take the room that the file will need.

        Raises:
            ValueError: the disk has none; the file is then closed.
        """
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            self.close()
            raise ValueError(f"{self._name} of {size} bytes: {error.strerror}") from error

    def bypass_cache(self) -> None:
        """From now on, read and write past the page cache, after what was written is on disk.

        Raises:
            ValueError: the file system does not allow it; the file is then closed.
        """
        os.fsync(self._descriptor)
        if sys.platform == "linux":
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
                self.read(aligned_memory(ALIGNMENT), 0, least=0)
                return
            except OSError:
                pass
        self.close()
        raise ValueError(
            f"{self._name}: its file system does not read past the page cache (O_DIRECT); name "
            "another directory, or set direct=false"
        )

    def read(self, memory: memoryview, offset: int, least: int | None = None) -> None:
        """Fill ``memory``; the file may end when ``least`` bytes of it are filled."""
        done, wanted = 0, len(memory) if least is None else least
        while done < len(memory):
            part = memory[done : done + _AT_ONCE]
            count = os.preadv(self._descriptor, [part], offset + done)
            done += count
            if count < len(part) and done >= wanted:
                return
            if count == 0 or (count < len(part) and count % ALIGNMENT):
                raise OSError(f"{self._name} ends at {offset + done} bytes, too early")

    def write(self, memory: memoryview, offset: int) -> None:
        """Write all of ``memory``."""
        done = 0
        while done < len(memory):
            part = memory[done : done + _AT_ONCE]
            done += os.pwritev(self._descriptor, [part], offset + done)

    def close(self) -> None:
        """Close it; harmless when it is closed already."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def measure_reading(directory: Path, direct: bool) -> float:
    """Bytes per second at which files of a directory are read.

    Raises:
        ValueError: it cannot be written, or not be read past the page cache though ``direct``.
    """
    memory = aligned_memory(_AT_ONCE)
    file = DiskFile.scratch(directory, _MEASURED)
    try:
        for offset in range(0, _MEASURED, _AT_ONCE):
            file.write(memory, offset)
        if direct:
            file.bypass_cache()
        start = time.perf_counter()
        for offset in range(0, _MEASURED, _AT_ONCE):
            file.read(memory, offset)
        return _MEASURED / (time.perf_counter() - start)
    finally:
        file.close()


class Rotation(Generic[Item]):
    """Slots that are filled in turn, by a thread of their own and ahead of their use.

    Args:
        slots: how many there are.
        fill: puts an item into a slot. What it raises, ``take`` raises.
        ahead: whether there is a thread; else a slot is filled when it is taken.
        name: of the thread.

    Attributes:
        waited: seconds that ``take`` has waited for slots to be filled.
    """

    def __init__(
        self, slots: int, fill: Callable[[int, Item], None], ahead: bool, name: str
    ) -> None:
        self.waited = 0.0
        self._slots, self._fill = slots, fill
        self._items: Iterator[Item] = iter(())
        self._next: list[Item] = []
        self._filled = self._taken = self._given = 0
        self._error: Exception | None = None
        self._busy = self._closed = False
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        if ahead:
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def start(self, items: Iterable[Item]) -> None:
        """Fill slots with these items from now on, and with no others."""
        self.stop()
        with self._change:
            self._items = iter(items)
            self._next = list(itertools.islice(self._items, 1))
            self._change.notify_all()

    def stop(self) -> None:
        """Fill no slot more; returns when none is being filled."""
        with self._change:
            self._next = []
            self._change.wait_for(lambda: not self._busy)
            self._filled = self._taken = self._given = 0
            self._error = None

    def take(self) -> int:
        """The slot that holds the next item; it stays so until it is given back."""
        start = time.perf_counter()
        if self._thread is None:
            self._fill_next()
        with self._change:
            self._change.wait_for(self._is_settled)
            self.waited += time.perf_counter() - start
            if self._filled == self._taken:
                raise self._error or RuntimeError("there is no item left to take")
            self._taken += 1
            return (self._taken - 1) % self._slots

    def give(self) -> None:
        """Give back the slot that has been held longest."""
        with self._change:
            self._given += 1
            self._change.notify_all()

    def close(self) -> None:
        """End the thread, when it has filled what it is filling."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _may_fill(self) -> bool:
        free = self._filled - self._given < self._slots
        return self._closed or (free and bool(self._next) and self._error is None)

    def _is_settled(self) -> bool:
        """Whether waiting for an item has an end."""
        over = self._closed or not (self._next or self._busy)
        return self._filled > self._taken or self._error is not None or over

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._may_fill)
                if self._closed:
                    return
            self._fill_next()

    def _fill_next(self) -> None:
        """Fill a slot with the next item, if there is one and none before it failed."""
        with self._change:
            if not self._next or self._error is not None:
                return
            [item], slot = self._next, self._filled % self._slots
            self._next, self._busy = list(itertools.islice(self._items, 1)), True
        error = None
        try:
            self._fill(slot, item)
        except Exception as raised:
            error = raised
        with self._change:
            self._busy = False
            self._error = error
            self._filled += error is None
            self._change.notify_all()
