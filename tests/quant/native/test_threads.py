"""Work on threads: in order, equal shares, errors where they belong."""

import os
import threading
import time

import pytest
import torch

from fewbit.quant.native.threads import over_threads, runs_of


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_several_threads(n_threads):
    seen = set()
    gate = threading.Barrier(n_threads, timeout=20)

    def work(item):
        seen.add(threading.get_ident())
        gate.wait()
        return item * item

    items = list(range(2 * n_threads))
    assert list(over_threads(work, items)) == [item * item for item in items]
    assert len(seen) == n_threads
    assert (seen == {threading.get_ident()}) == (n_threads == 1)


def test_nothing_runs_on_behind_an_error(n_threads):
    ended = []

    def work(item):
        if item == 0:
            raise ValueError("first")
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match="first"):
        list(over_threads(work, range(6)))
    before = list(ended)
    time.sleep(0.2)
    assert ended == before


def test_errors_are_raised(n_threads):
    results = over_threads(lambda item: 1 // item, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_work_may_use_threads_itself(n_threads):
    def outer(item):
        return sum(over_threads(lambda inner: inner * item, range(4)))

    assert list(over_threads(outer, range(2 * n_threads + 2))) == [
        6 * i for i in range(2 * n_threads + 2)
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_has_threads_of_its_own(n_threads):
    list(over_threads(abs, [1, 2, 3]))
    child = os.fork()
    if child == 0:
        os._exit(0 if list(over_threads(abs, [-1, -2, -3])) == [1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_shares():
    assert runs_of(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert runs_of(2, 8) == [(0, 1), (1, 2)]
    assert runs_of(0, 4) == []
