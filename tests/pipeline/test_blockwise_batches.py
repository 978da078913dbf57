"""Threads that give the same results in the same order, however many they are."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bitgrain.pipeline.blockwise.batches import Pool, single_threaded

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int):
    def work(i: int) -> int:
        time.sleep(0.002 * (7 - i % 7))  # later ones are ready first
        return i * i

    with Pool(workers) as pool:
        assert list(pool.map(work, range(20))) == [i * i for i in range(20)]
        assert list(pool.map(work, [])) == []
        assert list(pool.map(work, [3])) == [9]


@pytest.mark.parametrize("workers", [1, 3])
def test_work_runs_without_threads_of_torch_and_without_gradients(workers: int):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Pool(workers) as pool:
            for grad in (False, True):
                seen = list(pool.map(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(6), grad=grad))
                assert set(seen) == {(1, grad)}
        with single_threaded():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_few_results_wait_at_a_time(workers: int):
    """Items are drawn only when there is room: results may be large."""
    drawn, taken = 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for i in range(30):
            drawn += 1
            assert drawn - taken <= workers + 2
            yield i

    with Pool(workers) as pool:
        for _ in pool.map(lambda i: i, items()):
            taken += 1
    assert (drawn, taken) == (30, 30)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_in_its_place_and_ends_the_rest(workers: int):
    done: list[int] = []

    def work(i: int) -> int:
        if i == 4:
            raise KeyError("four")
        done.append(i)
        return i

    found: list[int] = []
    with Pool(workers) as pool, pytest.raises(KeyError, match="four"):
        found.extend(pool.map(work, range(100)))
    assert found == [0, 1, 2, 3]  # extend keeps what came before
    assert max(done) <= 4 + 2 * workers
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bitgrain")]
