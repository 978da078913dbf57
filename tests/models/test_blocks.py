"""Which lists of modules are stacks of blocks."""

from torch import nn

from bitgrain.models.blocks import block_index, find_blocks


def block() -> nn.Module:
    return nn.ModuleDict({"proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def moe_block() -> nn.Module:
    return nn.ModuleDict({"experts": nn.ModuleList([block(), block()]), "norm": nn.LayerNorm(4)})


def matrices(module: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def test_stacks_come_in_order_and_experts_are_no_stack():
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"layer": nn.ModuleList([block()])}),
            "decoder": nn.ModuleDict({"h": nn.ModuleList([moe_block(), moe_block()])}),
        }
    )
    assert find_blocks(model, matrices(model)) == ("encoder.layer.0", "decoder.h.0", "decoder.h.1")


def test_lists_that_are_no_stacks():
    model = nn.ModuleDict(
        {
            "heads": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            "norms": nn.ModuleList([nn.Sequential(nn.LayerNorm(4))]),
            "empty": nn.ModuleList([]),
        }
    )
    assert find_blocks(model, matrices(model)) == ()


def test_the_block_of_a_name():
    index_of = {"h.1": 1, "h.10": 10}
    assert block_index("h.1.proj.weight", index_of) == 1
    assert block_index("h.10.proj.weight", index_of) == 10
    assert block_index("h.100.proj.weight", index_of) is None
    assert block_index("head.weight", index_of) is None
