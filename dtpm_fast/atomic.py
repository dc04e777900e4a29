"""Files and folders are written whole or not at all: under a temporary name beside the target, fsynced, renamed."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dtpm_fast.errors import UserError

_reading_umask = threading.Lock()


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path in `target`'s folder; on a clean exit it becomes `target`, else it is removed.

    The temporary name keeps the target's suffix, because Pillow chooses the format by it, and starts with a dot
    and the target's name, so that a killed process leaves nothing that a folder listing would take for a result.
    Raises `UserError` when the folder cannot be written or the disk is full.
    """

    def make(folder: Path, prefix: str) -> Path:
        handle, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=Path(target).suffix)
        os.close(handle)
        return Path(name)

    with _replacing(Path(target), make, 0o666) as temporary:
        yield temporary


@contextmanager
def whole_folder(target: Path | str) -> Iterator[Path]:
    """The same for a folder of files. Raises `UserError` also when `target` exists and is not an empty folder."""
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; remove it or choose another folder")
    with _replacing(target, lambda folder, prefix: Path(tempfile.mkdtemp(dir=folder, prefix=prefix)), 0o777) as folder:
        yield folder


def short_name(name: str) -> str:
    """Names may have 255 bytes, and the temporary one has more than its target."""
    return name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


def _umask() -> int:
    """It can only be read by changing it, for all threads at once."""
    with _reading_umask:
        umask = os.umask(0)
        os.umask(umask)
    return umask


@contextmanager
def _replacing(target: Path, make: Callable[[Path, str], Path], mode: int) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = make(target.parent, f".{short_name(target.name)}.")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        temporary.chmod(mode & ~_umask())  # tempfile makes it private to the user
        temporary.replace(target)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"{target}: could not be written ({cause}); nothing was left behind") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
