"""Files that are never broken: written whole or not at all, by one program at a time, rescued where a disk refuses."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import tempfile
from pathlib import Path

from bgcbench.errors import OutputError
from bgcbench.locks import FileLock
from bgcbench.results.document import Document, dumps


def default_path(command: str, what: str, device: str) -> Path:
    """results/COMMAND-WHAT-DEVICE-UTCTIME.json under the current folder."""
    return Path("results") / f"{command}-{_slug(what)}-{_slug(device)}-{_stamp()}.json"


def _stamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def check_folder(path: Path, option: str) -> None:
    """Raise OutputError, which names the ``option``, unless a file ``path`` can be written; makes its folder."""
    try:
        if path.is_dir():
            raise OutputError(f"{option} {path} is a folder; name a file in it")
        if path.parent.exists() and not path.parent.is_dir():
            raise OutputError(f"{option} {path} cannot be written: {path.parent} is no folder; choose one")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, option, error) from error


def check_new(path: Path, option: str, *, replace: bool) -> None:
    """Raise OutputError, which names the ``option``, unless ``path`` can be written and is not there, or may go."""
    check_folder(path, option)
    check_free(path, option, replace=replace)


def check_free(path: Path, option: str, *, replace: bool) -> None:
    """Raise OutputError, which names the ``option``, for a file that is there and may not be replaced."""
    if path.exists() and not replace:
        raise OutputError(f"{option} {path} exists; use --force to replace it, or another name")


def write_named(path: Path, option: str, content: bytes) -> None:
    """Write a file that the user named by ``option``, whole or not at all; raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise unwritable(path, option, error) from error


def unwritable(path: Path, option: str, error: OSError) -> OutputError:
    return OutputError(f"{option} {path} cannot be written ({error.strerror or error}); choose another folder")


Identity = tuple[int, int, int, int]


def _identity(found: os.stat_result) -> Identity:
    """What changes when another program writes a file, in place or anew."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class ResultWriter:
    """Writes one document to one path, whole or not at all, and never over what somebody else has written meanwhile.

    Each write goes to a temporary file in the same folder, is synced and then renamed over the target, so an older
    file survives until a valid newer one exists. When a write fails in the middle of a run (a full disk), or finds a
    file that is neither this writer's nor the one it began with, ``problem`` says why and the document goes beside it,
    or to the system's temporary folder (``rescued_to``); the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rescued_to: Path | None = None
        self.problem: str | None = None
        self._lock = FileLock(path.parent / f".{path.name.removesuffix('.json')}.lock")
        self._seen = self._there()

    def claim(self, *, replace: bool) -> str | None:
        """Keep other runs from writing here until :meth:`release`; what cannot be locked is told, None where it can.

        Raises OutputError if another run writes here, if the file exists (unless ``replace``), or if its folder cannot
        be written.
        """
        check_folder(self.path, "--out")
        unsure = self._locked()
        self._seen = self._there()
        if self._seen is not None and not replace:
            self.release()
            raise OutputError(
                f"--out {self.path} exists; use --force to replace it, --resume {self.path} to continue it, "
                "or another name"
            )
        return unsure

    def _locked(self) -> str | None:
        try:
            self._lock.acquire()
        except BlockingIOError as held:
            raise OutputError(
                f"--out {self.path} is being written by another run ({held.strerror}); wait for its end, or give "
                "another name"
            ) from held
        except OSError as error:
            return (
                f"{self.path.parent} cannot lock files ({error.strerror or error}): see to it that no other run writes "
                f"{self.path.name} meanwhile"
            )
        return None

    def release(self) -> None:
        """Let other runs write here."""
        self._lock.release()

    def _there(self) -> Identity | None:
        try:
            return _identity(os.stat(self.path))
        except OSError:
            return None

    def write(self, document: Document) -> None:
        """Write now. Never raises for a file system that refuses: measuring must not end for that."""
        if self.problem is None:
            if self._there() in (None, self._seen):
                try:
                    self._seen = _identity(write_atomically(self.path, dumps(document).encode()))
                except OSError as error:
                    self.problem = error.strerror or str(error)
                else:
                    return
            else:
                self.problem = "another program has written it meanwhile"
        self.rescued_to = rescue(document, self.path.name, self.path.parent, self.rescued_to)


def rescue(document: Document, name: str, folder: Path = Path(), earlier: Path | None = None) -> Path | None:
    """Write a document that cannot go where it should to ``earlier``, else into ``folder``, else where temporary files
    go; returns where it is, None where it could not be written at all."""
    stem = f"bgcbench-rescued-{_stamp()}-{os.getpid()}-{name}"
    for path in (earlier, folder / stem, Path(tempfile.gettempdir()) / stem):
        with contextlib.suppress(OSError):
            if path is not None:
                write_atomically(path, dumps(document).encode())
                return path
    return None


def write_atomically(path: Path, content: bytes) -> os.stat_result:
    """Write a file whole or not at all: an older one survives until this one is on the disk. Raises OSError.

    Returns the file's status, which a later one tells apart from what others write.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        written = os.stat(name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return written
