"""How the processes of one start find each other, also when `torchrun` starts them again.

torchrun's agent keeps one key-value store for all its restarts, and torch.distributed connects to it without telling
them apart (seen in torch 2.15, for gloo): the new processes read the addresses of the dead ones and wait for them. So
every start agrees on a name of its own first, and its keys carry that name.
"""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

POLL = 0.02  # seconds


def fresh_store(rank: int, size: int, timeout: timedelta) -> tuple[Store, bool]:
    """A store that only the processes of this start share, from the variables of torchrun (or MASTER_ADDR and
    MASTER_PORT alone); and whether an earlier start of the same torchrun came before. Raises `RuntimeError` when a
    process does not come within `timeout`."""
    store, *_ = next(rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    name, starts = _agree(PrefixStore("dtpm-fast", store), rank, size, timeout)
    return PrefixStore(f"dtpm-fast/{name}", store), starts > 1 or int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    ) > 0


def _agree(store: Store, rank: int, size: int, timeout: timedelta) -> tuple[str, int]:
    """(name, number) of this start: rank 0 proposes a name, the others answer with names of their own, and rank 0
    confirms by listing those. A name that an earlier start has left is never confirmed to a process of this one."""
    mine = uuid.uuid4().hex
    if rank == 0:
        starts = store.add("starts", 1)
        store.set("proposed", mine)
        answers = [f"{mine}/{other}" for other in range(1, size)]
        store.wait(answers, timeout)
        store.set(f"{mine}/confirmed", " ".join([str(starts), *(store.get(answer).decode() for answer in answers)]))
        return mine, starts
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        name = store.get("proposed").decode()
        store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/confirmed"]):
            number, *known = store.get(f"{name}/confirmed").decode().split()
            if mine in known:
                return name, int(number)
        time.sleep(POLL)
    raise RuntimeError(f"rank {rank}: rank 0 did not answer within {timeout}")
