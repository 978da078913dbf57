"""How loaded models compute: packed weights through kernels, the same as the simulation, or an error with a remedy."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import bitgrain
import zoo
from bitgrain.errors import KernelError, SchemeError
from bitgrain.kernels import native
from bitgrain.numerics import IntFormat, QuantSpec, per_group, per_token
from bitgrain.pipeline.execution import Execution
from bitgrain.recipes import Scheme, make_recipe
from bitgrain.recipes.spec_model import SchemeModel
from bitgrain.runtime.quant_embedding import QuantEmbedding
from bitgrain.runtime.quant_experts import QuantExperts
from bitgrain.runtime.quant_linear import QuantLinear, quant_layers

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native module was not built")

WAYS: tuple[Execution, ...] = ("kernels", "dequantize")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "scheme", "packed"),
    [
        *(("llama", scheme, 14) for scheme in ("W4A8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "NVFP4", "W4AFP8")),
        ("gpt2", "W8A8", 8),
        ("bert", "W4A16_ASYM", 13),
    ],
)
def test_kernels_compute_what_the_simulation_does(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, scheme: str, packed: int
):
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme)
    how: Any = {"device": "cpu", "dtype": torch.float32}  # 16 bits are rounded to where layers are fused, or not
    dense = zoo.outputs(bitgrain.load(tmp_path / "out", execution="dequantize", **how), IDS)
    for execution in ("kernels", "reference"):
        model = bitgrain.load(tmp_path / "out", execution=execution, **how)
        assert len(list(quant_layers(model))) == packed
        assert float((zoo.outputs(model, IDS) - dense).std() / dense.std()) < 0.02


def test_generate(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A8")
    model: Any = bitgrain.load(tmp_path / "out", device="cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 16)


@pytest.mark.parametrize("how", [{}, {"low_bit": True}], ids=["kernels", "low bit"])
def test_packed_weights_are_not_saved_as_if_they_were_dense(
    tiny: Callable[[str], Path], tmp_path: Path, how: dict[str, bool]
):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16")
    packed = bitgrain.load(tmp_path / "out", device="cpu", **how)  # type: ignore[arg-type]
    expected = zoo.outputs(packed, IDS)
    for model in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert zoo.outputs(model, IDS).equal(expected)
        with pytest.raises(SchemeError, match="copy the folder"):
            cast(Any, model).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    dense: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    dense.save_pretrained(tmp_path / "saved")
    assert zoo.outputs(bitgrain.load(tmp_path / "saved", device="cpu"), IDS).equal(zoo.outputs(dense, IDS))


def test_layers_without_a_kernel_are_listed_with_the_remedy(tiny: Callable[[str], Path], tmp_path: Path):
    int16 = Scheme("int16", QuantSpec(IntFormat(4), per_group(32)), QuantSpec(IntFormat(16), per_token(), dynamic=True))
    recipe = make_recipe(scheme=SchemeModel.of(int16))
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", recipe=recipe)
    with pytest.raises(
        SchemeError, match=r"self_attn.* and \d+ more \(inputs in int16\): ask.*execution='dequantize'"
    ) as told:
        bitgrain.load(tmp_path / "out", device="cpu")
    assert "\n" not in str(told.value)
    with pytest.raises(SchemeError, match="there are: kernels, dequantize, reference"):
        bitgrain.load(tmp_path / "out", execution="fast")  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="low_bit"):
        bitgrain.load(tmp_path / "out", execution="kernels", low_bit=True)


@pytest.fixture
def float_kernels() -> Iterator[None]:
    """Kernels that round nothing to bfloat16."""
    module = native.native()
    before = module.isa()
    module.use_isa("portable")
    yield
    module.use_isa(before)


def compare(folder: Path, close: float, **arguments: Any) -> Any:
    """The model that runs kernels, its logits as close to the simulation's as a part of the largest."""
    model = bitgrain.load(folder, device="cpu", **arguments)
    execution = "reference" if arguments else "dequantize"
    dense = bitgrain.load(folder, device="cpu", execution=execution, **arguments)
    found, expected = zoo.outputs(model, IDS), zoo.outputs(dense, IDS)
    assert float((found - expected).abs().max() / expected.abs().max()) < close
    assert found.argmax(-1).equal(expected.argmax(-1))
    return model


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM", "NF4"])
@pytest.mark.parametrize(("name", "embedding"), [("llama", "model"), ("llama-tied", "model"), ("gemma", "model")])
@pytest.mark.usefixtures("float_kernels")
def test_embeddings_and_tied_heads(tiny: Callable[[str], Path], tmp_path: Path, name: str, embedding: str, scheme: str):
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme, include=[f"{embedding}.embed_tokens"])
    model = compare(tmp_path / "out", 1e-4)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    dense: Any = bitgrain.load(tmp_path / "out", device="cpu", execution="dequantize")
    assert isinstance(inputs, QuantEmbedding)
    assert isinstance(inputs, type(dense.get_input_embeddings()))
    assert inputs(IDS).equal(dense.get_input_embeddings()(IDS))
    assert isinstance(head, QuantLinear) == (name != "llama")
    if name != "llama":
        assert head.kernel is inputs.kernel
        model.tie_weights()
        assert head.kernel is model.get_output_embeddings().kernel
        assert "lm_head.packed_codes" not in model.state_dict()
    expected = zoo.outputs(model, IDS)
    assert zoo.outputs(copy.deepcopy(model), IDS).equal(expected)
    other = bitgrain.load(tmp_path / "out", device="cpu")
    other.load_state_dict(model.state_dict())
    assert zoo.outputs(other, IDS).equal(expected)
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 16)


def test_a_tied_model_with_inputs_in_8_bits(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama-tied"), tmp_path / "out", "W4A8", include=["model.embed_tokens"])
    model = compare(tmp_path / "out", 1e-2)
    assert model.get_output_embeddings().kernel.quantizer is None
    assert all("forward" in layer.__dict__ for layer in model.model.layers)  # fused all the same
    int8 = compare(tmp_path / "out", 1e-4, activations="int8")
    assert int8.get_output_embeddings().kernel.quantizer is not None


def test_embeddings_in_dtypes(tmp_path: Path):
    """Rows are rounded to what was stored, then to what is asked for."""
    source = zoo.save("llama-tied", tmp_path / "model", torch.bfloat16)
    bitgrain.quantize(source, tmp_path / "out", "W4A16", include=["model.embed_tokens"])
    for dtype in (None, torch.float32):
        both: list[Any] = [bitgrain.load(tmp_path / "out", device="cpu", dtype=dtype, execution=one) for one in WAYS]
        model, dense = both
        found, expected = zoo.outputs(model, IDS), zoo.outputs(dense, IDS)
        assert model.get_input_embeddings()(IDS).equal(dense.get_input_embeddings()(IDS))
        assert float((found - expected).abs().max() / expected.abs().max()) < 2e-2


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "W4A8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.usefixtures("float_kernels")
def test_stacked_experts(tiny: Callable[[str], Path], tmp_path: Path, name: str, scheme: str):
    bitgrain.quantize(tiny(name), tmp_path / "out", scheme)
    model = compare(tmp_path / "out", 1e-4 if scheme == "W4A16" else 1e-2)
    assert not any("experts" in path for path, _ in model.named_parameters() if not path.endswith("bias"))
    assert sum(isinstance(part, QuantExperts) for part in model.modules()) == 4
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 16)


@pytest.mark.usefixtures("float_kernels")
def test_experts_all_at_once(tmp_path: Path):
    bitgrain.quantize(zoo.save("llama4", tmp_path / "model"), tmp_path / "out", "W4A16")
    compare(tmp_path / "out", 1e-4)


def test_experts_that_share_a_static_scale(readable: Callable[..., Path], text: Path, tmp_path: Path):
    bitgrain.quantize(
        readable("mixtral"),
        tmp_path / "out",
        "W8A8_STATIC",
        calibration={"text": str(text), "windows": 4, "seqlen": 32},
    )
    compare(tmp_path / "out", 1e-2)


def test_experts_that_do_something_unknown(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bitgrain.quantize(tiny("mixtral"), tmp_path / "out", "W4A8")
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, x, *_: x * self.down_proj.norm())
    with pytest.raises(SchemeError, match=r"products only, not in Tensor.norm: ask for execution='dequantize'"):
        bitgrain.load(tmp_path / "out", device="cpu")


def test_without_the_native_module(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A8")
    monkeypatch.setattr(native, "_module", None)
    with pytest.raises(KernelError, match="the native kernels are not here"):
        bitgrain.load(tmp_path / "out", device="cpu")
    zoo.outputs(bitgrain.load(tmp_path / "out", device="cpu", execution="reference"), IDS)
    zoo.outputs(bitgrain.load(tiny("llama"), device="cpu"), IDS)


def test_in_memory():
    dense, packed = zoo.build("llama"), zoo.build("llama")
    bitgrain.quantize_(dense, "W4A8")
    found = bitgrain.quantize_(packed, "W4A8", execution="kernels")
    layers = dict(quant_layers(packed))
    assert {f"{path}.weight" for path in layers} == set(found)
    expected = zoo.outputs(dense, IDS)
    assert float((zoo.outputs(packed.requires_grad_(False), IDS) - expected).std() / expected.std()) < 0.02
    refused = zoo.build("llama")
    before = {name: value.clone() for name, value in refused.state_dict().items()}
    with pytest.raises(SchemeError, match="execution='dequantize'"):
        bitgrain.quantize_(refused, "W8A16INT16", execution="kernels")
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())


@pytest.mark.parametrize("name", ["llama-tied", "gemma", "mixtral", "gpt-oss"])
def test_embeddings_and_experts_in_memory(name: str):
    include = ["model.embed_tokens"] if name in ("llama-tied", "gemma") else []
    dense, packed = zoo.build(name), zoo.build(name).requires_grad_(False)
    scheme = "W4A16" if include else "W4A8"
    bitgrain.quantize_(dense, scheme, include=include)
    bitgrain.quantize_(packed, scheme, include=include, execution="kernels")
    found, expected = zoo.outputs(packed, IDS), zoo.outputs(dense, IDS)
    assert float((found - expected).std() / expected.std()) < 0.02
    assert any(isinstance(part, QuantEmbedding | QuantExperts) for part in packed.modules())


def test_weights_alone_with_inputs_in_8_bits(tiny: Callable[[str], Path], tmp_path: Path):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16")
    model = bitgrain.load(tmp_path / "out", device="cpu", activations="int8")
    assert all(layer.kernel.quantizer is not None for _, layer in quant_layers(model))
    with pytest.raises(SchemeError, match="int4"):
        bitgrain.load(tmp_path / "out", device="cpu", activations="int4")  # type: ignore[arg-type]


def test_a_gpu_has_no_kernels(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bitgrain.quantize(tiny("llama"), tmp_path / "out", "W4A16", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SchemeError, match=r"no kernel on cuda for .*execution='dequantize'.*, or for device='cpu'"):
        bitgrain.load(tmp_path / "out", device="cuda")
