"""What a parameter is, told from the module tree alone."""

from collections import Counter

import pytest
import torch
from torch import nn

from bitgrain.errors import ModelError
from bitgrain.models.structure import find_matrices

FORWARDS = {
    "linear": lambda self, x: torch.nn.functional.linear(x, self.weight[0]),
    "product": lambda self, x: torch.bmm(x, self.weight),
    "flipped product": lambda self, x: torch.bmm(x, self.weight.transpose(1, 2)),
    "hidden": lambda self, x: x,
}


def experts(forward: str, out: int, into: int, **attributes: int) -> nn.Module:
    """A module with 4 experts in one parameter, under the name `experts`."""
    module = type("ParallelExperts", (nn.Module,), {"forward": FORWARDS[forward]})()
    for name, value in {"num_experts": 4, **attributes}.items():
        setattr(module, name, value)
    module.weight = nn.Parameter(torch.empty(4, out, into))
    return nn.ModuleDict({"experts": module})


@pytest.mark.parametrize(("forward", "transposed"), [("linear", False), ("product", True)])
def test_square_experts_are_read_off_the_forward(forward, transposed):
    assert find_matrices(experts(forward, 8, 8))["experts.weight"].transposed == transposed


@pytest.mark.parametrize("forward", ["hidden", "flipped product"])
def test_experts_that_cannot_be_read(forward):
    with pytest.raises(ModelError, match=r"ParallelExperts\.weight .*\[in, out\] or \[out, in\]"):
        find_matrices(experts(forward, 8, 8))


@pytest.mark.parametrize(
    ("attributes", "transposed"),
    [
        ({"input_size": 6, "output_size": 8}, False),
        ({"input_size": 8, "output_size": 6}, True),
        ({"hidden_size": 6}, False),
        ({"hidden_size": 8}, True),
        ({"is_transposed": True}, True),
    ],
)
def test_attributes_tell_rows_from_columns(attributes, transposed):
    assert find_matrices(experts("hidden", 8, 6, **attributes))["experts.weight"].transposed == transposed


def test_stacks_that_are_not_experts():
    module = nn.Module()
    module.gates = nn.Parameter(torch.empty(10, 4, 4))  # block-diagonal gates
    module.position = nn.Parameter(torch.empty(1, 20, 4))
    assert find_matrices(nn.ModuleDict({"mixer": module})) == {}


def moe(router: nn.Module, shared: nn.Module) -> nn.Module:
    """Checkpoints with their own code may hold one module for each expert."""
    each = [nn.ModuleDict({"w1": nn.Linear(8, 12), "w2": nn.Linear(12, 8)}) for _ in range(3)]
    parts = {"gate": router, "experts": nn.ModuleList(each), "shared": shared, "norm": nn.LayerNorm(8)}
    return nn.ModuleDict({"mlp": nn.ModuleDict(parts)})


def test_a_list_of_expert_modules():
    found = find_matrices(moe(nn.Linear(8, 3), nn.Linear(8, 8)))
    assert Counter(matrix.role for matrix in found.values()) == {"expert": 6, "router": 1, "linear": 1}


def test_a_shared_expert_as_wide_as_the_number_of_experts_is_no_router():
    shared = nn.ModuleDict({"up": nn.Linear(8, 3), "down": nn.Linear(3, 8)})
    found = find_matrices(moe(nn.Linear(8, 3), shared))
    assert {name for name, matrix in found.items() if matrix.role == "router"} == {"mlp.gate.weight"}


def test_routers_with_more_parts_or_outputs():
    wide = nn.Linear(8, 5)  # two identity experts more
    small = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    for router in (wide, small):
        found = find_matrices(moe(router, nn.Identity()))
        routers = [name for name, matrix in found.items() if matrix.role == "router"]
        assert len(routers) == len(list(router.parameters())) // 2


def test_linears_of_foreign_classes():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 6, 8
            self.weight = nn.Parameter(torch.empty(8, 6))

    class Lora(nn.Linear):
        pass

    found = find_matrices(nn.ModuleDict({"own": Own(), "lora": Lora(2, 3)}))
    assert {matrix.class_name: matrix.role for matrix in found.values()} == {"Own": "linear", "Lora": "linear"}
