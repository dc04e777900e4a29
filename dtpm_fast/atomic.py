"""Files are written whole or not at all: to a temporary name beside the target, fsynced, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtpm_fast.errors import UserError


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path in `target`'s folder; on a clean exit it becomes `target`, else it is removed.

    The temporary name keeps the target's suffix, because Pillow chooses the format by it, and starts with a dot
    and the target's name, so that a killed process leaves nothing that a folder listing would take for a result.
    Raises `UserError` when the folder cannot be written or the disk is full.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private to the user
        temporary.replace(target)
    except OSError as error:
        raise UserError(
            f"{target}: could not be written ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
