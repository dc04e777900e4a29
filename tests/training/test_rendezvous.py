"""Processes that are started again must not read what the dead ones left in torchrun's store."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from dtpm_fast.training.rendezvous import _agree

SOON = timedelta(seconds=30)


def agree(store, ranks, size, timeout=SOON):
    """What each rank agrees on, the ranks arriving in this order; an error where it does not."""
    found = {}

    def arrive(rank):
        try:
            found[rank] = _agree(store, rank, size, timeout)
        except RuntimeError as error:
            found[rank] = error

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        thread.join(0.1)  # rank 1 before rank 0 finds only what an earlier start has left
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_every_start_has_a_name_of_its_own(order):
    store, names = HashStore(), []
    for start in (1, 2, 3):
        found = agree(store, order, 3)
        assert len(set(found.values())) == 1, found
        name, number = found[0]
        assert number == start
        names.append(name)
    assert len(set(names)) == 3


@pytest.mark.parametrize("alive", [(0,), (1,)])
def test_a_start_that_broke_off_is_not_taken_for_this_one(alive):
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    (error,) = agree(store, alive, 2, timedelta(seconds=0.3)).values()
    assert isinstance(error, RuntimeError)
    store.set_timeout(SOON)
    found = agree(store, (1, 0), 2)
    assert found[0] == found[1]
    assert found[0][1] == (2 if alive == (0,) else 1)
