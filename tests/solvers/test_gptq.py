"""GPTQ against a column loop written out, against round to nearest, and under every kind of spec."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import NumericsError, SchemeError
from bitgrain.numerics import Granularity, QTensor, QuantSpec, get_format, per_group, quantize
from bitgrain.numerics.qtensor import scale_values
from bitgrain.numerics.ranges import get_range
from bitgrain.numerics.spec import int_weight, nf4_double_quantized
from bitgrain.recipes import PRESETS
from bitgrain.solvers import Moments, get_solver, gptq
from bitgrain.solvers.gptq import GPTQ, column_order
from bitgrain.solvers.objective import layer_error, row_errors
from bitgrain.solvers.rtn import RoundToNearest, shared_outer_scale
from random_specs import LAWS, PLAIN, same, specs

W4 = int_weight(4, 16, asymmetric=True)


def layer(rows: int, cols: int, seed: int = 0, tokens: int = 0) -> tuple[torch.Tensor, Moments]:
    """Weights, and moments of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 0.1
    mix = torch.eye(cols) + 2 * torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(tokens or 4 * cols, cols, generator=generator) @ mix
    return weight, Moments(x.t() @ x / x.shape[0], x.shape[0])


def column_loop(weight: torch.Tensor, spec: QuantSpec, moments: Moments, order: str, damping: float) -> QTensor:
    """Algorithm 1 as one reads it: the inverse is shrunk column by column, scales when a new group begins."""
    w, h = weight.double(), moments.hessian.double()
    n = w.shape[1]
    width = spec.granularity.cols or n
    h = h + damping * h.diagonal().mean() * torch.eye(n)
    diagonal = moments.hessian.diagonal()
    falling = sorted(range(n), key=lambda j: -float(diagonal[j]))
    if order == "none":
        columns = list(range(n))
    elif order == "act":
        columns = falling
    else:
        groups = sorted(
            range(-(-n // width)), key=lambda g: -float(diagonal[g * width : (g + 1) * width].double().mean())
        )
        columns = [j for g in groups for j in falling if j // width == g]
    whole = quantize(weight, spec)
    steps, zeros = scale_values(whole.scale).clone(), None if whole.zero is None else whole.zero.clone()
    codes = torch.empty_like(whole.codes)
    fitted: set[int] = set()
    for position, j in enumerate(columns):
        k = j // width
        if order != "act" and k not in fitted:
            fitted.add(k)
            group = quantize(w[:, k * width : (k + 1) * width].float(), spec)
            steps[:, k] = scale_values(group.scale)[:, 0]
            if zeros is not None and group.zero is not None:
                zeros[:, k] = group.zero[:, 0]
        now = quantize(
            w.float(), spec, scale=steps.to(scale_values(whole.scale).dtype), zero=zeros
        )  # every column; only column j is taken
        codes[:, j] = now.codes[:, j]
        rest = columns[position:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        error = (w[:, j] - now.dequantize()[:, j].double()) / inverse[0, 0]
        for i, other in enumerate(rest):
            w[:, other] -= error * inverse[0, i]
    return QTensor(codes, steps, zeros, spec)


@pytest.mark.parametrize("order", ["act", "group", "none"])
@pytest.mark.parametrize(
    "spec",
    [
        int_weight(4, 8, asymmetric=True),
        int_weight(3, 10),
        int_weight(2),
        QuantSpec(get_format("fp4_e2m1"), per_group(8)),
        QuantSpec(get_format("nf4"), Granularity(3, 12), zero_point="real"),
        QuantSpec(get_format("int8"), Granularity(None, 1), restricted=True),
    ],
    ids=str,
)
def test_equals_the_column_loop(spec: QuantSpec, order: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "_LANES", 5)
    weight, moments = layer(8, 36, seed=3)
    found = GPTQ(damping=0.02, order=order, block=7).solve(weight, spec, moments).q
    expected = column_loop(weight, spec, moments, order, 0.02)
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.dequantize(), expected.dequantize(), rtol=1e-4)


@settings(LAWS, max_examples=40)
@given(
    specs(),
    st.sampled_from(["act", "group", "none"]),
    st.sampled_from([1, 4, 64]),
    st.integers(0, 2**31),
)
def test_without_correlation_it_is_round_to_nearest(spec: QuantSpec, order: str, block: int, seed: int):
    weight = torch.randn(7, 19, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[2] = 0.0
    moments = Moments(torch.eye(19), 100)
    try:
        expected = RoundToNearest().solve(weight, spec, moments).q
    except NumericsError:  # a scale beyond its storage
        with pytest.raises(NumericsError):
            GPTQ(order=order, block=block).solve(weight, spec, moments)
        return
    assert same(GPTQ(order=order, block=block).solve(weight, spec, moments).q, expected)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("order", ["act", "group", "none"])
def test_every_preset_is_better_than_round_to_nearest(name: str, order: str):
    weight, moments = layer(24, 96, seed=1)
    spec = PRESETS[name].weight
    found = GPTQ(order=order, sweeps=1).solve(weight, spec, moments)
    rtn = RoundToNearest().solve(weight, spec, moments).q
    assert found.method == "gptq"
    assert found.figures == {"damping": 0.01}
    assert found.q.codes.dtype == rtn.codes.dtype
    assert layer_error(weight, found.q, moments.hessian) < 0.9 * layer_error(weight, rtn, moments.hessian)


def test_ranges_see_the_importance_of_channels():
    weight, _ = layer(6, 32)
    spec = replace(W4, range=get_range("weighted"))
    moments = Moments(torch.linspace(0.1, 3.0, 32).diag(), 100)
    found = GPTQ(order="none").solve(weight, spec, moments).q
    assert same(found, RoundToNearest().solve(weight, spec, moments).q)
    assert not torch.equal(found.scale, quantize(weight, spec).scale)


@pytest.mark.parametrize("order", ["act", "group", "none"])
def test_nested_scales_keep_their_outer_scale(order: str):
    weight, moments = layer(16, 64)
    spec = PRESETS["NVFP4"].weight
    outer = shared_outer_scale([weight, weight * 4], spec)
    q = GPTQ(order=order, candidates=("spec", "minmax*0.9"), sweeps=2).solve(weight, spec, moments, outer_scale=outer).q
    assert torch.equal(q.scale.scale.float(), outer.float())
    doubled = nf4_double_quantized(16)
    q = GPTQ(order=order, candidates=("spec", "minmax*0.9"), sweeps=2).solve(weight, doubled, moments).q
    assert isinstance(q.scale, QTensor)
    assert torch.equal(q.scale.scale, RoundToNearest().solve(weight, doubled).q.scale.scale)


def test_each_row_keeps_the_candidate_that_suits_it(monkeypatch: pytest.MonkeyPatch):
    weight, moments = layer(20, 64, seed=5)
    alone = [GPTQ(candidates=(text,)).solve(weight, W4, moments).q for text in ("minmax*0.8", "minmax", "mse")]
    together = GPTQ(candidates=("minmax*0.8", "minmax", "mse")).solve(weight, W4, moments).q
    damped = moments.hessian + 0.01 * moments.importance.mean() * torch.eye(64)
    errors = torch.stack([row_errors(weight, q, damped) for q in alone])
    best = errors.argmin(dim=0)
    assert len(set(best.tolist())) > 1
    assert torch.allclose(row_errors(weight, together, damped), errors.amin(dim=0), rtol=1e-4)
    for row, choice in enumerate(best.tolist()):
        assert torch.equal(together.codes[row], alone[choice].codes[row])
    monkeypatch.setattr(gptq, "_LANES", 9)
    assert same(GPTQ(candidates=("minmax*0.8", "minmax", "mse")).solve(weight, W4, moments).q, together)


@pytest.mark.parametrize("tile", [(None, None), (4, None), (3, 16), (None, 1)])
def test_rows_that_share_a_scale_choose_together(tile: tuple[int | None, int | None]):
    weight, moments = layer(11, 40, seed=6)
    spec = replace(W4, granularity=Granularity(*tile))
    for order in ("act", "none"):
        few = GPTQ(order=order, candidates=("minmax*0.7",)).solve(weight, spec, moments).q
        many = GPTQ(order=order, candidates=("minmax*0.7", "minmax", "minmax*0.85")).solve(weight, spec, moments).q
        assert scale_values(many.scale).shape == spec.granularity.tiles((11, 40))
        assert layer_error(weight, many, moments.hessian) < layer_error(weight, few, moments.hessian)


def test_order_of_columns():
    importance = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, 0.0, 3.0])
    assert column_order(importance, per_group(3), "none").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert column_order(importance, per_group(3), "act").tolist() == [4, 1, 6, 2, 3, 0, 5]
    assert column_order(importance, per_group(3), "group").tolist() == [4, 3, 5, 6, 1, 2, 0]  # means 2.7, 3.7, 3


def test_scales_follow_the_updated_weights():
    """A group that the updates of the first one push beyond its own limits gets wider limits."""
    weight, moments = layer(16, 64, seed=2)
    static = GPTQ(order="act").solve(weight, W4, moments).q
    assert torch.equal(static.scale, quantize(weight, W4).scale)
    fitted = GPTQ(order="none").solve(weight, W4, moments).q
    assert torch.equal(fitted.scale[:, 0], static.scale[:, 0])
    assert (fitted.scale[:, 1:] > static.scale[:, 1:]).float().mean() > 0.5


def test_a_channel_without_inputs_is_rounded_alone():
    weight, _ = layer(8, 32)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 17]] = 0.0
    dead = Moments(x.t() @ x / 200, 200)
    found = GPTQ(damping=0.0).solve(weight, W4, dead)
    assert found.notes == ("2 input channels are always zero: rounded to nearest",)
    nearest = quantize(weight, W4)
    assert torch.equal(found.q.codes[:, [3, 17]], nearest.codes[:, [3, 17]])
    changed = weight.clone()
    changed[:, 3] = weight[:, 3] / 2  # what is in a dead channel changes nothing else
    other = GPTQ(damping=0.0).solve(changed, replace(W4, granularity=Granularity(1, 1)), dead).q
    same_rest = GPTQ(damping=0.0).solve(weight, replace(W4, granularity=Granularity(1, 1)), dead).q
    rest = [j for j in range(32) if j != 3]
    assert torch.equal(other.codes[:, rest], same_rest.codes[:, rest])


def test_singular_statistics_work_and_raised_damping_is_noted():
    weight, moments = layer(8, 32, tokens=5)
    found = GPTQ(damping=0.0).solve(weight, W4, moments)
    assert found.figures["damping"] > 0
    assert "damping was raised from 0" in found.notes[0]
    rtn = RoundToNearest().solve(weight, W4).q
    assert layer_error(weight, found.q, moments.hessian) < layer_error(weight, rtn, moments.hessian)


def test_no_tokens_means_round_to_nearest():
    weight, _ = layer(8, 32)
    found = GPTQ().solve(weight, W4, Moments(torch.zeros(32, 32), 0))
    assert found.method == "rtn"
    assert found.notes == ("calibration sent it no tokens: rounded to nearest",)
    assert same(found.q, quantize(weight, W4))


def test_bad_input_is_refused_by_name():
    weight, moments = layer(8, 32)
    with pytest.raises(SchemeError, match="v_proj: gptq needs the second moments"):
        GPTQ().solve(weight, W4, name="v_proj")
    with pytest.raises(SchemeError, match="v_proj has 32 input features"):
        GPTQ().solve(weight, W4, Moments(torch.eye(31), 5), name="v_proj")
    with pytest.raises(NumericsError, match="v_proj: 1024 of the 1024"):
        GPTQ().solve(weight, W4, replace(moments, hessian=moments.hessian * float("nan")), name="v_proj")
    weight[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="v_proj holds 0 NaN and 1 Inf"):
        GPTQ().solve(weight, W4, moments, name="v_proj")


def test_settings_are_checked():
    assert get_solver({"name": "gptq", "order": "group", "candidates": ["mse", "minmax*0.9"]}).order == "group"
    with pytest.raises(SchemeError, match="order is one of act, group, none, not 'desc'"):
        GPTQ(order="desc")
    with pytest.raises(SchemeError, match="unknown range 'maximal'"):
        GPTQ(candidates=("maximal",))
    for text in ("minmax*", "minmax*-1", "minmax*x"):
        with pytest.raises(SchemeError, match="a candidate is a range or"):
            GPTQ(candidates=(text,))
    with pytest.raises(SchemeError, match="damping"):
        GPTQ(damping=2.0)


@pytest.mark.parametrize(
    "settings", [GPTQ(), GPTQ(candidates=("minmax", "minmax*0.9"), sweeps=2)], ids=["plain", "refined"]
)
def test_bits_do_not_depend_on_threads(settings: GPTQ):
    weight, moments = layer(64, 96)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(settings.solve(weight, int_weight(4, 32, asymmetric=True), moments).q)
    finally:
        torch.set_num_threads(threads)
    assert same(found[0], found[1])
