"""Static input scales in a checkpoint: transformers with compressed-tensors loads the same function as we do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import zoo
from bitgrain.checkpoints.bitgrain_layout import BitgrainLayout
from bitgrain.checkpoints.compressed_tensors import CompressedTensors
from bitgrain.checkpoints.layout import Layout, StoredLayer
from bitgrain.errors import CheckpointError, SchemeError
from bitgrain.models.anatomy import read_anatomy
from bitgrain.models.skeleton import build_skeleton, load_config
from bitgrain.models.source import resolve_model
from bitgrain.numerics import QuantSpec, get_format, per_tensor, quantize
from bitgrain.numerics.observers import StaticInput, start, static_input, update
from bitgrain.numerics.ranges import Percentile
from bitgrain.pipeline.load import (
    attach_input_quantizers,
    experts_run_one_by_one,
    load,
)
from bitgrain.pipeline.stored import QuantizedCheckpoint
from bitgrain.recipes import PRESETS, Scheme
from bitgrain.runtime.watch import Key, Watch, parameters_of

pytestmark = pytest.mark.usefixtures("device")

ASYMMETRIC = replace(
    PRESETS["W8A8_STATIC"],
    name="W8A8_STATIC_ASYM",
    input=QuantSpec(get_format("int8"), per_tensor(), zero_point="integer"),
)
CLIPPED = replace(PRESETS["W8A8_STATIC"], input=replace(PRESETS["W8A8_STATIC"].input, range=Percentile(99.0)))


def written(name: str, scheme: Scheme, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of the zoo's model `name` whose linears and experts have static inputs, as a pipeline writes it."""
    source = zoo.save(name, folder / "source", dtype)
    tensors = zoo.read_tensors(source)
    config = load_config(resolve_model(source), False)
    anatomy = read_anatomy(build_skeleton(config, False), tensors)
    weights = [weight for weight in anatomy.weights if weight.role in ("linear", "expert")]
    scheme = scheme.for_dtype(dtype)
    assert scheme.input is not None
    inputs = observed(source, [target for weight in weights for target in weight.targets], scheme.input)
    layers = [
        StoredLayer(
            *(weight.tensor, weight.module, weight.memory_module, weight.class_name, weight.role),
            *(weight.out_features, weight.in_features, weight.experts, weight.transposed, dtype, scheme),
        )
        for weight in weights
    ]
    layout: Layout = CompressedTensors()
    if any(layout.refusal(layer) for layer in layers):
        layout = BitgrainLayout()
    seen = {weight.tensor: inputs[weight.targets[0]] for weight in weights}
    for weight, layer in zip(weights, layers, strict=True):
        tensor = tensors.pop(weight.tensor)
        stack = list(tensor) if weight.experts > 1 else [tensor]
        parts = [quantize(one.T if weight.transposed else one, scheme.weight) for one in stack]
        encoded = layout.encode(layer, parts, [seen[weight.tensor]] * weight.experts)
        tensors |= {key: value.clone() for key, value in encoded.items()}  # experts share theirs
    kept = [(w.module, w.memory_module, w.class_name) for w in anatomy.weights if w not in weights]
    out = folder / "out"
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "quantization_config": layout.config(layers, kept)}))
    return out


def observed(source: Path, names: list[str], spec: QuantSpec) -> dict[str, StaticInput]:
    """The static input of each parameter, from random tokens; stacks of experts share one."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    experts_run_one_by_one(model.config)
    states = {name: start(spec.range) for name in names}

    def product(key: Key, x: torch.Tensor) -> None:
        states[key.name] = update(states[key.name], x)

    with Watch(parameters_of(model, names), product), torch.inference_mode():
        zoo.outputs(model, zoo.ids_for(model, seed=1))
    return {name: static_input(state, spec, name) for name, state in states.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "scheme", "dtype"),
    [
        ("llama", PRESETS["W8A8_STATIC"], torch.bfloat16),
        ("llama", PRESETS["FP8"], torch.float32),
        ("phi", CLIPPED, torch.float32),
        ("qwen3", ASYMMETRIC, torch.bfloat16),
    ],
    ids=["int8-bfloat16", "fp8-float32", "clipped-float32", "asymmetric-bfloat16"],
)
def test_transformers_computes_the_same(name: str, scheme: Scheme, dtype: torch.dtype, tmp_path: Path):
    out = written(name, scheme, tmp_path, dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = zoo.ids_for(theirs)
    expected = zoo.outputs(theirs.eval(), ids)
    assert torch.equal(
        zoo.outputs(load(out, device="cpu", rounding="transformers", execution="dequantize"), ids), expected
    )
    plain = zoo.outputs(load(out, device="cpu", execution="dequantize"), ids)
    if dtype == torch.float32:  # otherwise transformers divides in the dtype of the model, vLLM in float32
        assert torch.equal(plain, expected)
    full = zoo.outputs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval(), ids)
    assert 1e-4 < float((plain - full).abs().mean()) < 0.2 * float(full.std())


def test_inputs_are_rounded_by_the_scales_in_the_file(tmp_path: Path):
    out = written("llama", PRESETS["W8A8_STATIC"], tmp_path)
    model: Any = load(out, device="cpu", execution="dequantize")
    ids = zoo.ids_for(model)
    before = zoo.outputs(model, ids)
    scale = zoo.read_tensors(out)["model.layers.0.mlp.up_proj.input_scale"]
    quantizer = model.model.layers[0].mlp.up_proj.input_quantizer
    assert quantizer.static.scale.tolist() == [scale.tolist()]
    path = out / "model.safetensors"
    changed = {name: t * 16 if name.endswith("input_scale") else t for name, t in zoo.read_tensors(out).items()}
    save_file(changed, path, metadata={"format": "pt"})
    assert not torch.allclose(zoo.outputs(load(out, device="cpu", execution="dequantize"), ids), before, atol=1e-2)
    save_file({name: t for name, t in changed.items() if name != "model.layers.1.mlp.down_proj.input_scale"}, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.input_scale is missing"):
        QuantizedCheckpoint(out)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_of_one_parameter_run_with_the_largest_scale(name: str, tmp_path: Path):
    """mixtral: a matrix a tensor, compressed-tensors; gpt-oss: stacks, our layout. vLLM takes the maximum, too."""
    out = written(name, PRESETS["FP8"], tmp_path)
    stored = QuantizedCheckpoint(out)
    assert stored.layout.name == ("compressed-tensors" if name == "mixtral" else "bitgrain")
    scales = {tensor: [float(one.scale) for one in found] for tensor, found in stored.static_inputs().items()}
    experts = {tensor: values for tensor, values in scales.items() if "experts" in tensor}
    assert {len(values) for values in experts.values()} == {1 if name == "mixtral" else 4}
    tensors = zoo.read_tensors(out)
    one = next(key for key in tensors if "layers.0" in key and "input_scale" in key and ("w3" in key or "gate" in key))
    tensors[one] = tensors[one].clone()
    tensors[one][-1] *= 3
    save_file(tensors, out / "model.safetensors")
    model: Any = load(out, device="cpu", execution="dequantize")
    quantizer = model.model.layers[0].mlp.experts.gate_up_proj_input_quantizer
    assert float(quantizer.static.scale) == float(tensors[one][-1])
    assert torch.isfinite(zoo.outputs(model, zoo.ids_for(model))).all()


def test_a_static_scheme_without_scales_is_refused(tmp_path: Path):
    source = zoo.save("llama", tmp_path / "source")
    model: Any = load(source, device="cpu")
    anatomy = read_anatomy(model, zoo.read_tensors(source))
    schemes = {weight.tensor: PRESETS["FP8"] for weight in anatomy.weights if weight.role == "linear"}
    with pytest.raises(SchemeError, match="which only calibration can give"):
        attach_input_quantizers(model, anatomy, schemes)
    layer = StoredLayer("a.weight", "a", "a", "Linear", "linear", 4, 8, 1, False, torch.float32, PRESETS["FP8"])
    for layout in (CompressedTensors(), BitgrainLayout()):
        with pytest.raises(ValueError, match="a stores 1 static input scales, 0 are given"):
            layout.encode(layer, [quantize(torch.ones(4, 8), PRESETS["FP8"].weight)])
