"""Inputs of linear layers: against a slow twin that keeps everything, and on the model with built-in outliers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bitgrain.checkpoints.reader import open_checkpoint
from bitgrain.errors import ModelError, TextError
from bitgrain.evaluation.inspection.activations import GRANULARITIES, ActivationInspection, Site, inspect_activations
from bitgrain.evaluation.inspection.job import inspect_model
from bitgrain.numerics import QuantSpec, fake_quantize, get_format
from bitgrain.numerics.measures import sqnr_db
from bitgrain.pipeline.load import experts_run_one_by_one
from bitgrain.progress import QuietProgress

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CPU = torch.device("cpu")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


def ids(windows: int, seqlen: int = 16) -> Any:
    return torch.randint(0, 128, (windows, seqlen), generator=torch.Generator().manual_seed(0))


def site(parameter: str, in_features: int = 64) -> Site:
    return Site(parameter, parameter, None, in_features, (parameter,))


NAMES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
]


def sites() -> list[Site]:
    return [site(f"{name}.weight", 96 if "down" in name else 64) for name in NAMES]


def look(model: nn.Module, windows: int = 3) -> tuple[ActivationInspection, ...]:
    return inspect_activations(model, sites(), ids(windows), CPU, QuietProgress())


def test_every_figure_equals_the_twin_that_keeps_everything():
    found = look(llama())
    model, kept = llama(), {name: [] for name in NAMES}
    for name in NAMES:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: kept[name].append(args[0][0]))
    with torch.no_grad():
        for window in ids(3):
            model(input_ids=window[None])
    for name, result in zip(NAMES, found, strict=True):
        x = torch.cat(kept[name])
        assert result.tokens == len(x) == 48
        assert result.absmax == float(x.abs().max())
        assert result.channels.absmax == result.absmax
        assert result.kurtosis == pytest.approx(twin_kurtosis(x), rel=1e-9)
        for loss in result.losses:
            tile, dynamic = GRANULARITIES[loss.granularity]
            spec = QuantSpec(get_format(loss.format), tile, restricted=loss.format == "int8")
            assert loss.dynamic == dynamic
            rounded = fake_quantize(x, spec)
            assert loss.sqnr_db == pytest.approx(sqnr_db(x, rounded), abs=1e-6)
            # as the diagonal of W^T W weighs the features
            c = model.get_submodule(name).weight.double().square().sum(0).sqrt()
            assert loss.felt_db == pytest.approx(sqnr_db(x * c, rounded * c), abs=1e-5)


def twin_kurtosis(x: Tensor) -> float:
    x = x.double() - x.double().mean()
    return float((x**4).mean() / (x**2).mean() ** 2 - 3)


def test_no_figure_depends_on_the_number_of_threads():
    one = look(llama(), windows=5)
    torch.set_num_threads(3)
    try:
        three = look(llama(), windows=5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert one == three


def test_experts_are_seen_with_the_tokens_routed_to_them():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()
    experts_run_one_by_one(model.config)
    path = "model.layers.0.mlp.experts"
    found = inspect_activations(
        model, [site(f"{path}.gate_up_proj"), site(f"{path}.down_proj", 96)], ids(2), CPU, QuietProgress()
    )
    assert [result.tokens for result in found] == [64, 64]  # two experts a token
    assert all(len(result.losses) == 8 for result in found)


def test_inputs_with_nan_give_no_figures():
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.input_layernorm.weight")[3] = math.nan
    q, _, _, head = look(model)
    assert (q.nonfinite, q.losses, q.channels) == (48, (), None)
    assert head.nonfinite == 48


def test_models_and_windows_that_do_not_fit():
    with pytest.raises(TextError, match="--seqlen 2048"):
        inspect_activations(llama(), sites(), ids(1, 2049), CPU, QuietProgress())
    small = transformers.T5Config(
        vocab_size=128, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ModelError, match="encoder and a decoder"):
        inspect_activations(transformers.T5ForConditionalGeneration(small), [], ids(1), CPU, QuietProgress())


@pytest.fixture(scope="module")
def twins(shared: Path) -> dict[str, dict[str, ActivationInspection]]:
    found = {}
    for name in ("llama", "llama-outliers"):
        folder, text = shared / "models" / name, shared / "text" / "heldout.txt"
        result = inspect_model(folder, layers="re:.*(q|k|v|gate|up)_proj", text=text, windows=2, device="cpu")
        assert result.text.tokens == 1024
        found[name] = {activation.module: activation for activation in result.activations}
    return found


def test_the_outlier_twin_shows_its_channels(shared: Path, twins: dict[str, dict[str, ActivationInspection]]):
    plain, loud = (open_checkpoint(shared / "models" / name) for name in ("llama", "llama-outliers"))
    checked = 0
    for module, found in twins["llama-outliers"].items():
        parent, norm = (
            (module.split(".self_attn")[0], "input_layernorm")
            if "self_attn" in module
            else (module.split(".mlp")[0], "post_attention_layernorm")
        )
        tensor = f"{parent}.{norm}.weight"
        built = (loud.read(tensor) / plain.read(tensor) > 2).nonzero().flatten().tolist()
        assert len(built) == 6
        if module.startswith("model.layers.0.self_attn"):
            continue  # straight from the embeddings, where three of the six are all but silent before they are scaled
        assert found.channels.outliers == 6, module
        assert sorted(top.index for top in found.channels.top[:6]) == built
        assert found.channels.ratio > 20
        checked += 1
    assert checked == 27


def test_the_outlier_twin_loses_more_where_channels_share_a_scale(twins: dict[str, dict[str, ActivationInspection]]):
    for module, plain in twins["llama"].items():
        loud = twins["llama-outliers"][module]
        assert loud.sqnr("per_token", "int8") < plain.sqnr("per_token", "int8")
        for name in ("per_tensor", "per_token"):
            assert loud.felt(name, "int8") < plain.felt(name, "int8") - 6, module
        # a scale for each channel takes the gain out again: the function is the same
        assert loud.felt("per_channel", "int8") == pytest.approx(plain.felt("per_channel", "int8"), abs=0.1)
        assert loud.kurtosis > plain.kurtosis + 50
