"""Inspection against closed forms, slow twins, and the job that really quantizes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from bitgrain.api import quantize as quantize_checkpoint
from bitgrain.errors import ModelError, PlanError, RecipeError, TextError
from bitgrain.evaluation.inspection import weights as inspection
from bitgrain.evaluation.inspection.channels import describe_channels, excess_kurtosis, power_sums
from bitgrain.evaluation.inspection.job import inspect_model
from bitgrain.evaluation.inspection.weights import FORMATS, GRANULARITIES, MatrixLoss, inspect_matrix, recommend
from bitgrain.numerics import QuantSpec, get_format, quantize
from bitgrain.numerics.formats import BF16, FP32
from bitgrain.numerics.measures import code_use, measure

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "tiny"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "mixtral"
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def signs(rows: int, cols: int) -> Tensor:
    return torch.randint(0, 2, (rows, cols), generator=torch.Generator().manual_seed(0)).float() * 2 - 1


def ones_lost_under(peak: float, codes: int = 127) -> float:
    """Error of the number 1 on the symmetric int8 grid that `peak` stretches."""
    step = peak / codes
    return 1 - step * round(1 / step)


class TestClosedForms:
    def test_a_large_row_is_repaired_by_output_channels(self):
        w = signs(256, 256)
        w[3] = 100
        found = inspect_matrix(w)
        power, error = 255 * 256 + 256 * 1e4, 255 * 256 * ones_lost_under(100) ** 2
        expected = 10 * math.log10(power / error)
        assert found.sqnr("per_tensor", "int8") == pytest.approx(expected, abs=1e-3)
        # every column holds the large row
        assert found.sqnr("per_channel(1)", "int8") == pytest.approx(expected, abs=1e-3)
        assert found.sqnr("per_channel", "int8") > 120
        assert found.recommended == {"int8": "per_channel", "int4": "per_channel"}
        assert (found.outputs.ratio, found.outputs.outliers, found.outputs.top[0].index) == (100, 1, 3)
        assert (found.outputs.top[0].minimum, found.outputs.top[0].maximum) == (100, 100)
        assert (found.inputs.ratio, found.inputs.outliers) == (1, 0)

    def test_a_large_column_is_repaired_by_input_channels_and_held_by_groups(self):
        w = signs(256, 256)
        w[:, 5] = 100
        found = inspect_matrix(w)
        power, lost = 255 + 1e4, ones_lost_under(100) ** 2
        for name, spoiled in (
            ("per_tensor", 255),
            ("per_channel", 255),
            ("per_group(128)", 127),
            ("per_group(32)", 31),
        ):
            expected = 10 * math.log10(power / (spoiled * lost))
            assert found.sqnr(name, "int8") == pytest.approx(expected, abs=1e-3), name
        assert found.sqnr("per_channel(1)", "int8") > 120
        assert found.inputs.top[0].index == 5
        assert (found.inputs.outliers, found.outputs.outliers) == (1, 0)
        assert found.recommended["int8"] == "per_group(32)"  # per_group(64) is 10 log10(63 / 31) = 3.1 dB below

    def test_a_large_corner_stays_in_its_block(self):
        w = signs(256, 256)
        w[:128, :128] *= 100
        assert inspect_matrix(w).recommended["int8"] == "per_block(128, 128)"

    def test_kurtosis_of_known_distributions(self):
        two = torch.tensor([[-1.0, 1.0] * 50])
        assert excess_kurtosis(power_sums(two).sum(0).tolist(), 100) == pytest.approx(-2)
        ladder = torch.arange(1000.0)[None]
        assert excess_kurtosis(power_sums(ladder).sum(0).tolist(), 1000) == pytest.approx(-1.2, abs=1e-5)
        assert excess_kurtosis(power_sums(torch.full((4, 8), 3.0)).sum(0).tolist(), 32) is None
        normal = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        assert abs(inspect_matrix(normal).kurtosis) < 0.05

    def test_dead_channels_are_counted_and_leave_the_median_alone(self):
        w = signs(8, 6)
        w[:5] = 0
        w[:, 1] = 0
        w[6] *= 7
        found = inspect_matrix(w)
        assert (found.outputs.dead, found.inputs.dead) == (5, 1)
        assert (found.outputs.median_absmax, found.outputs.ratio, found.outputs.outliers) == (1, 7, 1)
        assert found.zeros == (5 * 6 + 3) / 48

    def test_an_all_zero_matrix_is_exact(self):
        found = inspect_matrix(torch.zeros(4, 4))
        assert found.outputs.ratio is None
        assert found.kurtosis is None
        assert all(loss.sqnr_db == math.inf for loss in found.losses)
        assert found.recommended == {"int8": "per_tensor", "int4": "per_tensor"}

    def test_median_of_an_even_number_of_channels(self):
        found = describe_channels(torch.tensor([-1.0, -2.0, 0.0, -8.0]), torch.tensor([0.0, 1.0, 4.0, 1.0]))
        assert (found.median_absmax, found.absmax, found.smallest_absmax) == (3, 8, 1)
        assert [channel.index for channel in found.top] == [3, 2, 1, 0]

    def test_recommendation_is_the_coarsest_within_the_tolerance(self):
        db = {"per_tensor": 10.0, "per_channel": 17.5, "per_channel(1)": 30.0, "per_group(32)": 20.4}
        bits = {"per_tensor": 4.0, "per_channel": 4.1, "per_channel(1)": 4.05, "per_group(32)": 4.5}
        losses = [MatrixLoss(name, "int4", value, bits[name], 1.0, 1.0) for name, value in db.items()]
        assert recommend(losses, 3.0) == {"int4": "per_channel"}
        assert recommend(losses, 2.5) == {"int4": "per_group(32)"}
        assert recommend(losses, 20.0) == {"int4": "per_tensor"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200, 300), (256, 256), (3, 7), (129, 33)])
def test_every_figure_equals_the_slow_twin(shape: tuple[int, int], dtype: torch.dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = inspect_matrix(w)
    for format in FORMATS:
        for name, grain in GRANULARITIES.items():
            spec = QuantSpec(get_format(format), grain, scale=BF16 if dtype == torch.bfloat16 else FP32)
            q = quantize(w, spec)
            use, loss = code_use(q), found.loss(name, format)
            assert loss.sqnr_db == pytest.approx(measure(w, q).sqnr_db, abs=1e-9)
            assert loss.bits_per_weight == q.count_bits() / w.numel()
            assert loss.span == pytest.approx(use.span_mean, abs=1e-12)
            assert loss.hit == pytest.approx(use.hit_mean, abs=1e-12)
    assert found.absmax == float(w.abs().max())
    assert found.outputs.absmax == found.inputs.absmax == found.absmax


def test_no_figure_depends_on_threads_or_pieces(monkeypatch: pytest.MonkeyPatch):
    w = torch.randn(300, 700, generator=torch.Generator().manual_seed(2))
    before = inspect_matrix(w)
    torch.set_num_threads(2)
    try:
        assert inspect_matrix(w) == before
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(inspection, "_CHUNK_ELEMENTS", 1)
    pieces = inspect_matrix(w)
    for loss, other in zip(before.losses, pieces.losses, strict=True):
        assert (loss.sqnr_db, loss.span, loss.hit) == pytest.approx((other.sqnr_db, other.span, other.hit), rel=1e-12)
    assert (pieces.kurtosis, pieces.outputs, pieces.inputs) == (before.kurtosis, before.outputs, before.inputs)


class TestSampling:
    def test_scales_come_from_all_rows(self):
        w = signs(1024, 64)
        w[1000] = 100  # not in the sampled bands
        found = inspect_matrix(w, max_rows=200)
        assert found.sampled_rows == 256
        assert found.sqnr("per_tensor", "int8") == pytest.approx(-20 * math.log10(abs(ones_lost_under(100))), abs=1e-3)
        assert found.outputs.outliers == 1

    def test_row_local_losses_are_those_of_the_bands(self):
        w = torch.randn(1024, 160, generator=torch.Generator().manual_seed(3))
        part = torch.cat([w[:128], w[512:640]])
        sampled, direct = inspect_matrix(w, max_rows=256), inspect_matrix(part)
        for name in ("per_channel", "per_group(128)", "per_group(32)", "per_block(128, 128)"):
            assert sampled.sqnr(name, "int4") == direct.sqnr(name, "int4")

    def test_a_sample_is_close_and_small_matrices_are_whole(self, monkeypatch: pytest.MonkeyPatch):
        w = torch.randn(2048, 128, generator=torch.Generator().manual_seed(4))
        whole = inspect_matrix(w)
        assert whole.sampled_rows is None
        monkeypatch.setattr(inspection, "EXACT_ELEMENTS", 512 * 128)
        sampled = inspect_matrix(w)
        assert sampled.sampled_rows == 512
        assert inspect_matrix(w, max_rows=None) == whole
        for loss in whole.losses:
            assert sampled.sqnr(loss.granularity, loss.format) == pytest.approx(loss.sqnr_db, abs=0.5)


class TestModel:
    def test_every_linear_once_with_a_summary(self, tiny: Path):
        found = inspect_model(tiny)
        assert len(found.layers) == 14
        assert {layer.kind for layer in found.layers} >= {"self_attn.q_proj", "mlp.down_proj"}
        assert [kind.layers for kind in found.summary.kinds] == [2] * 7
        assert len(found.summary.sensitive) == 14
        assert sum(found.summary.recommended["int4"].values()) == 14
        worst = found.summary.sensitive[0]
        by_name = {layer.module: layer.sqnr("per_group(128)", "int4") for layer in found.layers}
        assert by_name[worst] == min(by_name.values())
        assert found.activations is None

    def test_layers_are_chosen_as_by_a_rule(self, tiny: Path):
        assert [x.module for x in inspect_model(tiny, layers="lm_head").layers] == ["lm_head"]
        assert len(inspect_model(tiny, layers="re:.*mlp.*").layers) == 6
        assert len(inspect_model(tiny, layers="q_proj").layers) == 2

    def test_a_pattern_that_matches_nothing_suggests_a_name(self, tiny: Path):
        with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
            inspect_model(tiny, layers="q_prj")
        with pytest.raises(RecipeError, match="not a regular expression"):
            inspect_model(tiny, layers="re:(")

    def test_experts_are_one_layer_with_the_worst_figures(self, mixtral: Path):
        found = inspect_model(mixtral)
        experts = [layer for layer in found.layers if layer.role == "expert"]
        assert len(experts) == 6  # w1, w2, w3 of two blocks
        assert all(layer.matrices == 4 and ".*." in layer.module for layer in experts)
        layer = next(x for x in experts if x.kind.endswith("w2"))
        assert 0 <= layer.worst_matrix < 4
        assert layer.elements == 4 * 64 * 96

    def test_json_has_no_nan_and_no_infinity(self, tiny: Path):
        text = json.dumps(inspect_model(tiny, layers="q_proj").to_json(), allow_nan=False)
        data = json.loads(text)
        assert set(data) >= {"model", "layers", "summary", "activations", "notes", "tolerance_db"}
        assert data["layers"][0]["losses"][0]["granularity"] == "per_tensor"

    def test_exact_results_are_null_in_json(self, tmp_path: Path):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.zero_()
            model.model.layers[1].mlp.up_proj.weight[2, 3] = math.nan
        model.save_pretrained(tmp_path)
        found = inspect_model(tmp_path, layers="up_proj")
        zero, damaged = found.layers
        assert zero.sqnr("per_tensor", "int4") == math.inf
        assert damaged.nonfinite == 1
        assert damaged.losses == ()
        assert found.summary.damaged == (damaged.module,)
        assert found.summary.dead_outputs == 96
        assert "NaN" in found.notes[0]
        data = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert data["layers"][0]["losses"][0]["sqnr_db"] is None

    def test_a_quantized_checkpoint_is_refused(self, tiny: Path, tmp_path: Path):
        quantize_checkpoint(tiny, tmp_path / "out", "W8A16", device="cpu")
        with pytest.raises(ModelError, match="already quantized"):
            inspect_model(tmp_path / "out")

    def test_zero_rows_are_refused(self, tiny: Path):
        with pytest.raises(PlanError, match="at least 1"):
            inspect_model(tiny, max_rows=0)


def test_what_inspection_says_is_what_quantize_does(shared: Path, tmp_path: Path):
    found = inspect_model(shared / "models" / "llama", layers="re:.*layers.[01].*_proj")
    result = quantize_checkpoint(shared / "models" / "llama", tmp_path / "out", "W4A16", device="cpu")
    done = {layer["tensor"].removesuffix(".weight"): layer.get("sqnr_db") for layer in result.manifest["layers"]}
    assert len(found.layers) == 14
    for layer in found.layers:
        assert layer.sqnr("per_group(128)", "int4") == pytest.approx(done[layer.module], abs=1e-6)


def test_a_text_shorter_than_a_window(shared: Path, tmp_path: Path):
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time.")
    with pytest.raises(TextError, match="one window needs 512"):
        inspect_model(shared / "models" / "llama", text=text)
    with pytest.raises(TextError, match="2048 positions"):
        inspect_model(shared / "models" / "llama", text=shared / "text" / "heldout.txt", seqlen=2049, windows=1)
