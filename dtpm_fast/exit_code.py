"""Exit codes of every command: 0 on success, 1 on a failure with a one-line cause, 2 on bad usage (argparse's own)."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dtpm_fast.errors import UserError


def run(work: Callable[[], int]) -> int:
    """Call `work`; a `UserError` becomes one line on standard error and exit code 1, Ctrl-C exit code 130. A reader of
    the output that has gone (`| head`) is exit code 1 without a line; a file or folder that the system refuses is one
    with its name and the system's reason."""
    if sys.stderr is None:  # closed (2>&-): bars would fail, lines go to standard output, and its number to a file
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error's: names may be no UTF-8
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # an OSError too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
