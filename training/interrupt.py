"""Ctrl-C and SIGTERM, which may come at any line, wait where a half-done change would be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# In the order in which they count where several came. SIGCHLD is where the loader's handler raises an error for a
# worker that died, at any line as well. Windows has none.
WAITING = [signal.Signals(getattr(signal, n)) for n in ("SIGINT", "SIGTERM", "SIGCHLD") if hasattr(signal, n)]


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM, which `kill`, systemd, containers and preempted machines send, is a `KeyboardInterrupt` inside of the
    `with`, so that the state is saved as after Ctrl-C. Sent to a whole group of processes, as systemd and SLURM do, it
    ends the loader's workers too; from then on that is no error."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield  # it is somebody else's
        return
    put_aside: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        for died in WAITING[2:]:
            put_aside.setdefault(died, signal.signal(died, signal.SIG_DFL))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for died, handler in put_aside.items():
            signal.signal(died, handler)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C, SIGTERM and the death of a loader's worker take effect at the end of the `with`, where somebody handles
    them; the first two before the last, which they bring about."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in WAITING if callable(handler := signal.getsignal(number))}
    seen: dict[int, FrameType | None] = {}
    for number in handlers:
        signal.signal(number, lambda number, frame: seen.setdefault(number, frame))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in WAITING:
            if number in seen:
                handlers[number](number, seen[number])
