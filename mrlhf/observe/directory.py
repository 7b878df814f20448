"""The directory that a command writes into: whether it can be, and by one process at a time.

The lock is a file with flock, which the kernel releases however its holder ends. flock may not reach processes on other
machines (some network file systems), so the holder also writes its host and pid into the file, and again every BEAT_S.
A holder on another machine counts as dead when its beat has not changed for STALE_S.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
from pathlib import Path

import msgspec

from mrlhf.errors import ConfigError, MrlhfError

BEAT_S, STALE_S = 5.0, 60.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of the file system
log = logging.getLogger(__name__)


class _Sign(msgspec.Struct):
    """What a holder writes into its lock. beat: time.time() of the last writing."""

    host: str
    machine: str
    pid: int
    started: str
    beat: float = 0.0


def directory_problem(directory: Path, *, key: str) -> ConfigError | None:
    """Why nothing can be written into `directory`, which need not exist yet. It finds out without writing.

    key: the option that names the directory.
    """
    nearest = next(p for p in (directory, *directory.parents, Path()) if os.path.lexists(p))
    missing = directory.relative_to(nearest).parts if nearest != Path() else directory.parts
    what = None
    if not os.path.isdir(nearest):
        what = f"{nearest} is not a directory"
    elif any(len(os.fsencode(name)) > os.pathconf(nearest, "PC_NAME_MAX") for name in missing):
        what = f"a name of more than {os.pathconf(nearest, 'PC_NAME_MAX')} bytes"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        what = f"{nearest} cannot be written (permission, or a read-only disk)"
    else:
        disk = os.statvfs(nearest)
        if (disk.f_blocks and not disk.f_bfree) or (disk.f_files and not disk.f_ffree):
            what = f"the disk of {nearest} is full"
    if what is None:
        return None
    return ConfigError(what, where=f"{key} = {directory}", expected="a directory that can be written, or made")


def file_problems(file: str, *, key: str) -> list[ConfigError]:
    """Why the output file of option `key` cannot be written."""
    if os.path.isdir(file):
        return [ConfigError(f"{key} = {file} is a directory", where=key, expected="a file to write")]
    problem = directory_problem(Path(file).parent, key=f"directory of {key}")
    return [] if problem is None else [problem]


def _machine() -> str:
    """Tells machines apart, also where two have one name. Containers of one machine share it, and its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def is_held(file: Path) -> bool:
    """Whether another process of this machine holds the lock `file`."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no flock here
        return False
    return False


class DirectoryLock:
    """Holds `file` from its construction to `release`, or to the end of the process. Makes the directory.

    A process forked from this one does not hold it. Raises an error of class `kind` where another process holds it, and
    ConfigError where the directory cannot be written. key: the option that names the directory; fix: what else the user
    can do.
    patience_s: for a holder that is about to end, such as a rank that torchrun replaces.
    """

    def __init__(self, file: Path, *, key: str, fix: str, kind: type[MrlhfError] = ConfigError,
                 patience_s: float = 0.0) -> None:
        self.file, self._where, self._fix, self._kind = file, f"{key} = {file.parent}", fix, kind
        self._sign = _Sign(socket.gethostname(), _machine(), os.getpid(), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self._fd = -1
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        try:
            end = time.monotonic() + patience_s
            while not self._take():
                if time.monotonic() > end:
                    raise self._in_use(self._read())
                time.sleep(0.1)
            os.register_at_fork(after_in_child=self._close)
            self._write_sign()
        except OSError as error:
            self._close()
            what = f"cannot be written: {error.strerror}"
            fix = "make room, another path, or mend this one"
            raise ConfigError(what, where=self._where, fix=fix) from error
        self._thread.start()

    def _take(self) -> bool:
        """Whether this process has the lock now."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._fd, alone = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            alone = False
        try:  # its holder may have removed or renamed the directory
            same = os.path.samestat(os.fstat(self._fd), self.file.stat())
        except FileNotFoundError:
            same = False
        if not same:
            self._close()
            return False
        before = self._read()
        if before is not None and not (alone and before.machine == self._sign.machine):
            self._await_silence(before)
        return True

    def _await_silence(self, other: _Sign) -> None:
        """Waits until a holder on another machine counts as dead. Raises where it lives: where its beat changes."""
        began = time.monotonic()
        while (waited := time.monotonic() - began) < STALE_S and (
            waited < 3 * BEAT_S or time.time() - other.beat < STALE_S
        ):
            time.sleep(BEAT_S / 5)
            now = self._read()
            if now is None:
                return
            if now != other:
                self._close()
                raise self._in_use(now)
        age = max(0.0, time.time() - other.beat)
        log.warning(f"{self.file.parent}: host {other.host}, pid {other.pid}, held it and has given no sign for "
                    f"{age:.0f} s; this run takes it over")

    def _in_use(self, other: _Sign | None) -> MrlhfError:
        who = "another process"
        if other is not None:
            age = max(0.0, time.time() - other.beat)
            who += f" (host {other.host}, pid {other.pid}, since {other.started}, last sign {age:.0f} s ago)"
        return self._kind(f"{who} is writing there", where=self._where, fix=self._fix)

    def _read(self) -> _Sign | None:
        """What the holder wrote; None where nobody has, the last holder has released it, or it is something else."""
        try:
            if not self.file.is_file():  # reading a pipe would wait for its writer
                return None
            with self.file.open("rb") as file:
                return msgspec.json.decode(file.read(4096), type=_Sign)
        except (OSError, ValueError, RecursionError):  # ValueError: also msgspec's
            return None

    def _write_sign(self) -> None:
        self._sign.beat = time.time()
        text = msgspec.json.encode(self._sign).ljust(511) + b"\n"  # one write, always of one length
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        os.fsync(self._fd)  # else a network file system shows it late

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end a run
                self._write_sign()

    def _close(self) -> None:
        """The lock stays with the parent when a forked child does this."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        self._close()

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
