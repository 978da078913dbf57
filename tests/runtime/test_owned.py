"""What stands in place of a module's method goes with the module, and keeps nothing alive."""

import copy
import gc
import pickle
import weakref

from torch import nn

from bitgrain.runtime.owned import OwnedBy


def owning() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.__dict__["method"] = OwnedBy(layer)
    return layer


def test_a_copy_has_one_of_its_own():
    layer = owning()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert again.__dict__["method"].owner is again
    assert layer.__dict__["method"].owner is layer


def test_it_keeps_no_module_alive():
    layer = owning()
    seen = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert seen() is None
    finally:
        gc.enable()
