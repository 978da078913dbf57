"""Columns that are kept in 16 bits: how many, which, and that they come back as they were."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import QTensor, fake_quantize, quantize
from bitgrain.numerics.columns import ColumnChoice, Columns
from bitgrain.numerics.formats import BF16, FP16, FP32
from bitgrain.numerics.spec import int_weight, nf4_double_quantized
from bitgrain.recipes import Scheme, get_scheme, make_recipe
from bitgrain.recipes.spec_model import SpecModel

ONE = ColumnChoice(0.01)
SPEC = replace(int_weight(4, 32, scale=FP16), columns=ONE)


@given(st.integers(1, 9000), st.floats(1e-9, 0.5), st.integers(1, 50))
def test_how_many(cols: int, share: float, rows: int):
    choice = ColumnChoice(share)
    count = choice.count(cols)
    assert 1 <= count <= cols
    assert share * cols - 1e-5 <= count < share * cols + 1 + 1e-5
    assert choice.count_bits(rows, cols) == count * (32 + 16 * rows)


@pytest.mark.parametrize(("share", "cols", "count"), [(0.01, 256, 3), (0.01, 100, 1), (0.07, 100, 7), (0.02, 4096, 82)])
def test_how_many_by_hand(share: float, cols: int, count: int):
    assert ColumnChoice(share).count(cols) == count


def test_which():
    weight = torch.tensor([[3.0, 0.1, -4.0, 0.2, 0.0], [4.0, 0.1, 0.0, 5.1, 0.0]])
    magnitude = torch.tensor([0.1, 7.0, 0.2, 0.3, 7.0])
    assert ColumnChoice(0.4, "weight").choose(weight).tolist() == [0, 3]
    assert ColumnChoice(0.4).choose(weight, magnitude).tolist() == [1, 4]
    assert ColumnChoice(0.2).choose(weight, magnitude).tolist() == [1]
    assert ColumnChoice(0.2).choose(weight, magnitude).dtype == torch.int32
    drawn = {tuple(ColumnChoice(0.4, "random", seed).choose(weight).tolist()) for seed in range(80)}
    assert len(drawn) == 10  # all pairs
    again = ColumnChoice(0.4, "random", 3)
    assert torch.equal(again.choose(weight), again.choose(torch.rand(7, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)])
def test_they_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = x.reshape(-1, 40)
    plain = quantize(x, int_weight(2, 8))
    choice = ColumnChoice(0.1, "weight").for_dtype(dtype)
    index = choice.choose(matrix)
    q = QTensor(plain.codes, plain.scale, None, replace(plain.spec, columns=choice),
                columns=Columns.of(matrix, index, choice.torch_dtype))  # fmt: skip
    found = q.dequantize(dtype).view(-1, 40)
    rest = [i for i in range(40) if i not in index.tolist()]
    assert q.shape == shape
    assert torch.equal(found[:, index], matrix[:, index])
    assert torch.equal(found[:, rest], plain.dequantize(dtype).view(-1, 40)[:, rest])


def test_bits_names_and_the_dtype_of_the_checkpoint():
    plain = replace(SPEC, columns=None)
    assert SPEC.count_bits((64, 130)) == plain.count_bits((64, 130)) + 2 * (64 * 16 + 32)
    assert SPEC.describe() == "int4 per_group(32) 1 % of the columns in float16 (activation), scale float16"
    assert "columns" in repr(SPEC)
    assert "columns" not in repr(plain)
    for columns in (ONE, ColumnChoice(0.3, "random", 7, BF16), None):
        spec = replace(SPEC, columns=columns)
        assert SpecModel.of(spec).build() == spec
    for dtype, stored in ((torch.bfloat16, BF16), (torch.float16, FP16), (torch.float32, FP16)):
        columns = Scheme("kept", SPEC).for_dtype(dtype).weight.columns
        assert columns is not None
        assert columns.dtype == stored


def test_a_recipe_gives_them_to_every_scheme():
    rules = [{"match": "down_proj", "scheme": "W8A16"}, {"match": "Embedding", "include": True}]
    recipe = make_recipe(scheme="W4A16", columns={"share": 0.03, "by": "random", "seed": 2}, rules=rules)
    names = (("up_proj", "Linear", "linear"), ("down_proj", "Linear", "linear"), ("embed", "Embedding", "embedding"))
    assigned = recipe.assign([_Layer(*name) for name in names])
    found = [scheme and scheme.weight.columns for scheme in assigned]
    assert found == [ColumnChoice(0.03, "random", 2)] * 2 + [None]  # what is looked up has no input channels
    assert recipe.fallback().weight.columns is None


def test_what_has_no_meaning():
    for share in (0.0, -0.1, 0.6, float("nan")):
        with pytest.raises(SchemeError, match="share above 0 and at most"):
            ColumnChoice(share)
    with pytest.raises(SchemeError, match="by activation, weight or random, not by 'size'"):
        ColumnChoice(0.1, "size")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="float16 or bfloat16, not float32"):
        ColumnChoice(0.1, dtype=FP32)
    with pytest.raises(SchemeError, match="up: which columns are kept by activation only calibration can tell"):
        ONE.choose(torch.ones(2, 5), name="up")
    with pytest.raises(SchemeError, match="not of inputs or of scales"):
        replace(SPEC, dynamic=True)
    with pytest.raises(SchemeError, match="not of inputs or of scales"):
        replace(SPEC, scale=replace(nf4_double_quantized().scale, columns=ONE))  # type: ignore[type-var]
    with pytest.raises(SchemeError, match="beside inputs with dynamic scales only"):
        Scheme("mine", SPEC, get_scheme("W8A8_STATIC").input)
    with pytest.raises(SchemeError, match="kept of weights, not of inputs or outputs"):
        Scheme("mine", int_weight(4), SPEC)
    x = torch.ones(3, 64)
    with pytest.raises(SchemeError, match="solve_matrix"):
        quantize(x, SPEC)
    with pytest.raises(SchemeError, match="kept columns have no simulation"):
        fake_quantize(x, SPEC)
    with pytest.raises(SchemeError, match="no columns were kept"):
        replace(quantize(x, replace(SPEC, columns=None)), spec=SPEC)
    with pytest.raises(NumericsError, match="up: 3 weights of its kept columns overflow float16"):
        Columns.of(1e6 * x, torch.tensor([5], dtype=torch.int32), torch.float16, "up")


class _Layer:
    def __init__(self, module: str, class_name: str, role: str) -> None:
        self.module = self.memory_module = module
        self.class_name, self.role = class_name, role
