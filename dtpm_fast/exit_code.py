"""Exit codes of every command: 0 on success, 1 on a failure with a one-line cause, 2 on bad usage (argparse's own)."""

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dtpm_fast.errors import UserError


def run(work: Callable[[], int]) -> int:
    """Call `work`; a `UserError` becomes one line on standard error and exit code 1, Ctrl-C exit code 130. A reader of
    the output that has gone (`| head`) is exit code 1 without a line; a full disk behind it, and a file or folder that
    the system refuses, is one with the name and the system's reason."""
    if sys.stderr is None:  # closed (2>&-): bars would fail, lines go to standard output, and its number to a file
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error's: names may be no UTF-8
    try:
        code = work()
        if sys.stdout is not None:  # closed (>&-)
            sys.stdout.flush()  # at its own end Python would complain, and its exit code is 120
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # an OSError too
        _drop_output()
        return 1
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:  # a write does not say where the disk is full
            raise
        if error.filename is None:
            _drop_output()
        print(
            f"error: {error.filename or 'standard output, or a file of this command'}: {error.strerror}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """Else Python fails at its end once more over what is not written yet."""
    if sys.stdout is not None:  # closed (>&-)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
