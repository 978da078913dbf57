"""Memory for weights: its own bytes for each tensor, shared mappings that go with the last of them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from bitgrain.kernels import memory
from bitgrain.kernels.memory import CHUNK, LARGE_PAGE, LINE, large_memory, use_large_pages, weight_memory
from bitgrain.kernels.native import is_available

if not is_available():
    pytest.skip("the native module is not built", allow_module_level=True)


def test_weights_lie_side_by_side_and_apart():
    sizes = [1, 63, 64, 65, 4096, 0, 3 << 20, 7]
    made = [weight_memory(size).fill_(i) for i, size in enumerate(sizes)]
    for i, (one, size) in enumerate(zip(made, sizes, strict=True)):
        assert one.shape == (size,)
        assert one.dtype == torch.uint8
        assert bool((one == i).all())
        assert one.data_ptr() % LINE == 0
    starts = sorted(one.data_ptr() for one in made if len(one))
    assert starts[-1] - starts[0] < 4 << 20  # one mapping


def test_a_copy_takes_no_more_than_its_bytes():
    one = weight_memory(1000).fill_(3)
    weight_memory(1 << 20)
    assert one.untyped_storage().nbytes() == 1000
    assert len(pickle.dumps(one)) < 3000
    assert copy.deepcopy(one).equal(one)


def test_a_weight_larger_than_a_mapping():
    first = weight_memory(5).fill_(1)
    large = weight_memory(CHUNK + 5)
    large[-1] = 7
    assert (first == 1).all()
    assert large[-1] == 7
    assert large.data_ptr() % LARGE_PAGE == 0


def test_mappings_go_with_their_last_tensor(monkeypatch: pytest.MonkeyPatch):
    found = memory._Chunks()
    monkeypatch.setattr(memory, "_weights", found)
    one, other = weight_memory(10), weight_memory(10)
    mapping = found._mapping
    assert isinstance(mapping, weakref.ref)
    del one
    gc.collect()
    assert mapping() is not None
    del other
    gc.collect()
    assert mapping() is None
    assert weight_memory(10).fill_(1).sum() == 10


@pytest.mark.parametrize("nbytes", [0, 1, LARGE_PAGE - 1, LARGE_PAGE, 5 * LARGE_PAGE + 3])
def test_large_memory_starts_at_a_large_page(nbytes: int):
    found = large_memory(nbytes).fill_(1)
    assert found.sum() == nbytes
    assert nbytes == 0 or found.data_ptr() % LARGE_PAGE == 0


def test_what_moves_to_large_pages_stays_what_it_is():
    x = torch.arange(3 << 20)
    address, before = x.data_ptr(), x.clone()
    use_large_pages(x)
    assert x.data_ptr() == address
    assert x.equal(before)
    use_large_pages(torch.ones(3))
