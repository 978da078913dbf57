"""What a copy of a module's inner workings rests on."""

import gc
import weakref
from typing import Any

import torch
from torch import nn

from bitgrain.kernels.native import native
from bitgrain.runtime.guards import Guards


def test_dictionaries_hold_the_same_objects():
    first, second = {"a": [1], "b": None}, {"c": 2.5}
    seen = native().Seen([(first, "a", first["a"]), (second, "c", second["c"]), (second, "d", None)])
    assert seen.hold()
    first["a"].append(2)
    assert seen.hold()
    second["d"] = 1
    assert not seen.hold()
    del second["d"]
    first["a"] = [1, 2]  # equal is not the same
    assert not seen.hold()
    first.clear()
    assert not seen.hold()


def test_what_is_seen_is_freed_with_the_circle_it_is_in():
    class Owner:
        pass

    owner: Any = Owner()
    owner.seen = native().Seen([(owner.__dict__, "seen", owner)])
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_hooks_parameters_and_modules():
    block: Any = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4)))
    guards = Guards.of_block(block, {"1.0": ["weight", "bias"]})
    assert guards.hold()
    assert guards.no_hooks()
    handle = block[1][0].register_forward_pre_hook(lambda *_: None)
    assert not guards.no_hooks()
    handle.remove()
    assert guards.no_hooks()
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    assert not guards.no_hooks()
    everywhere.remove()
    block[0].forward = lambda x: x
    assert not guards.no_hooks()
    del block[0].forward
    assert guards.no_hooks()
    with torch.no_grad():
        block[0].weight.mul_(2)
    assert guards.hold()  # not one that counts
    block[1][0].weight.data = torch.ones(4)
    assert not guards.hold()
    guards.look()
    with torch.no_grad():
        block[1][0].bias.add_(1)
    assert not guards.hold()
