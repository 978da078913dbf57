"""Recipes: strict on disk, rules that reach the layers they name, and the same value after a round trip."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgrain.errors import RecipeError, SchemeError
from bitgrain.numerics import QuantSpec, get_format, per_group
from bitgrain.numerics.ranges.mse import MSE
from bitgrain.numerics.ranges.percentile import Percentile
from bitgrain.recipes import PRESETS, Recipe, Scheme, load_recipe, make_recipe
from bitgrain.recipes.spec_model import SchemeModel, SpecModel
from random_specs import LAWS, RANGES, specs


@dataclass(frozen=True)
class Layer:
    module: str
    role: str = "linear"
    class_name: str = "Linear"
    memory: str | None = None
    place: int = 0

    @property
    def memory_module(self) -> str:
        return self.memory or self.module


LAYERS = [
    Layer("model.embed_tokens", "embedding", "Embedding"),
    Layer("model.layers.0.self_attn.q_proj"),
    Layer("model.layers.0.mlp.down_proj"),
    Layer("model.layers.1.self_attn.q_proj"),
    Layer("model.layers.1.mlp.down_proj"),
    Layer("model.layers.1.mlp.gate", "router", "TopKRouter"),
    Layer("model.layers.1.mlp.experts.0.w1", "expert", "Experts", "model.layers.1.mlp.experts"),
    Layer("model.layers.1.conv", "conv", "Conv1d"),
    Layer("lm_head", "lm_head"),
]


def names(recipe: Recipe, layers: list[Layer] = LAYERS) -> dict[str, str | None]:
    assigned = recipe.assign(layers)
    return {layer.module: scheme and scheme.name for layer, scheme in zip(layers, assigned, strict=True)}


def rules(*given: dict[str, Any], scheme: str = "W4A16") -> Recipe:
    return make_recipe(scheme=scheme, rules=list(given))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_rules_only_linears_and_experts_are_reached():
    found = names(make_recipe(scheme="W4A16"))
    assert {module for module, scheme in found.items() if scheme} == {
        layer.module for layer in LAYERS if layer.role in ("linear", "expert")
    }
    assert set(found.values()) == {"W4A16", None}


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.1.mlp.gate", "lm_head"])
def test_what_is_kept_by_default_can_be_named(module: str):
    assert names(rules({"match": module, "scheme": "W8A16"}))[module] == "W8A16"


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"]),
        ("down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("mlp.down_proj", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        ("Embedding", ["model.embed_tokens"]),
        ("TopKRouter", ["model.layers.1.mlp.gate"]),
        ("experts", ["model.layers.1.mlp.experts.0.w1"]),  # by its name in memory
        ("experts.0.w1", ["model.layers.1.mlp.experts.0.w1"]),  # by its name on disk
        (r"re:.*layers\.1\..*proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        ("re:lm_.*", ["lm_head"]),
    ],
)
def test_match_by_name_end_class_and_expression(match: str, hits: list[str]):
    found = names(rules({"match": match, "scheme": "FP8_DYNAMIC"}))
    assert [module for module, scheme in found.items() if scheme == "FP8_DYNAMIC"] == hits


@pytest.mark.parametrize("match", ["own_proj", "proj", "re:down_proj", "re:layers.*", "model.layers.0", "linear"])
def test_parts_of_words_and_of_names_do_not_match(match: str):
    with pytest.raises(RecipeError, match="matches no layer"):
        names(rules({"match": match, "keep": True}))


def test_class_name_reaches_every_linear_the_head_too():
    found = names(rules({"match": "Linear", "scheme": "W8A16"}))
    assert found["lm_head"] == found["model.layers.0.mlp.down_proj"] == "W8A16"
    assert found["model.layers.1.mlp.experts.0.w1"] == "W4A16"


def test_a_later_rule_overrides_an_earlier_one():
    wide, narrow = {"match": "down_proj", "keep": True}, {"match": "layers.1.mlp.down_proj", "scheme": "W8A16"}
    assert names(rules(wide, narrow))["model.layers.1.mlp.down_proj"] == "W8A16"
    assert names(rules(wide, narrow))["model.layers.0.mlp.down_proj"] is None
    assert names(rules(narrow, wide))["model.layers.1.mlp.down_proj"] is None


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ("donw_proj", "did you mean 'down_proj'?"),
        ("model.layers.0.mlp.dwn_proj", "did you mean 'model.layers.0.mlp.down_proj'?"),
        ("re:lm_heat", "did you mean 'lm_head'?"),
        ("xyzzy", "layers end in "),
    ],
)
def test_idle_rule_is_an_error_with_a_suggestion(match: str, hint: str):
    with pytest.raises(RecipeError) as caught:
        names(rules({"match": match, "scheme": "W8A16"}))
    assert f"the rule {match!r} matches no layer of this model" in str(caught.value)
    assert hint in str(caught.value)


def test_range_applies_to_the_weights_of_every_scheme():
    recipe = make_recipe(scheme="W8A8", range="mse", rules=[{"match": "lm_head", "scheme": "W8A16"}])
    assigned = dict(zip([layer.module for layer in LAYERS], recipe.assign(LAYERS), strict=True))
    for module, preset in (("lm_head", "W8A16"), ("model.layers.0.mlp.down_proj", "W8A8")):
        assert assigned[module] == replace(PRESETS[preset], weight=replace(PRESETS[preset].weight, range=MSE()))
    exact = make_recipe(scheme="W4A16", range={"name": "percentile", "percent": 99.5})
    found = next(scheme for scheme in exact.assign(LAYERS) if scheme)
    assert found.weight.range == Percentile(percent=99.5)


def test_inline_scheme(tmp_path: Path):
    path = write(
        tmp_path,
        """
        scheme:
          name: INT4_G32
          weight: {format: int4, granularity: per_group(32), scale: {format: fp8_e4m3, granularity: per_tensor}}
          input: {format: int8, granularity: per_token, restricted: true, dynamic: true}
        rules:
          - match: lm_head
            scheme: {weight: {format: nf4, granularity: per_group(64)}}
        """,
    )
    assigned = load_recipe(path).assign(LAYERS)
    assert assigned[1] == Scheme(
        "INT4_G32",
        QuantSpec(
            get_format("int4"),
            per_group(32),
            scale=QuantSpec(get_format("fp8_e4m3"), PRESETS["FP8"].weight.granularity),
        ),
        PRESETS["W8A8"].input,
    )
    assert assigned[-1] == Scheme("custom", QuantSpec(get_format("nf4"), per_group(64)))


FULL = {
    "scheme": "w4a16",
    "solver": "rtn",
    "range": {"name": "percentile", "percent": 99.0},
    "on_indivisible": "channel",
    "rules": [
        {"match": "down_proj", "scheme": "W8A16"},
        {"match": r"re:.*\.0\..*", "keep": True},
        {"match": "lm_head", "scheme": SchemeModel.of(PRESETS["NVFP4"]).model_dump(mode="json")},
    ],
}


@pytest.mark.parametrize("settings", [{"scheme": "W8A8"}, FULL], ids=["defaults", "everything"])
def test_yaml_round_trip(tmp_path: Path, settings: dict[str, Any]):
    recipe = make_recipe(**settings)
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.assign(LAYERS) == recipe.assign(LAYERS)
    assert again.to_yaml() == recipe.to_yaml()


def test_yaml_writes_every_default_out():
    text = make_recipe(scheme="W8A8").to_yaml()
    assert all(f"{key}:" in text for key in Recipe.model_fields)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(tmp_path: Path, name: str):
    spelled = make_recipe(scheme=SchemeModel.of(PRESETS[name]).model_dump(mode="json"))
    assert load_recipe(write(tmp_path, spelled.to_yaml())).assign(LAYERS)[1] == PRESETS[name]


@LAWS
@given(specs(ranges=RANGES), st.booleans())
def test_spec_model_gives_back_any_spec(spec: QuantSpec, dynamic: bool):
    spec = replace(spec, dynamic=dynamic)
    model = SpecModel.of(spec)
    assert model.build() == spec
    assert SpecModel.model_validate(model.model_dump(mode="json")).build() == spec


def test_overrides_replace_top_level_keys(tmp_path: Path):
    path = write(tmp_path, "scheme: W4A16\nrules: [{match: lm_head, scheme: W8A16}]\n")
    recipe = load_recipe(path, scheme="FP8_DYNAMIC", on_indivisible="pad")
    assert recipe.scheme == "FP8_DYNAMIC"
    assert recipe.on_indivisible == "pad"
    assert recipe.rules[0].match == "lm_head"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shceme": "W4A16"}, ["unknown key 'shceme'", "did you mean 'scheme'?"]),
        ({"scheme": "W4A16", "sover": "rtn"}, ["unknown key 'sover'", "did you mean 'solver'?"]),
        ({"scheme": "W4A16", "zzzz": 1}, ["unknown key 'zzzz'", "known keys: ", "on_indivisible"]),
        ({"scheme": "W4A16", "rules": [{"macth": "a", "keep": True}]}, ["'rules.0.macth'", "did you mean 'match'?"]),
        (
            {"scheme": {"weight": {"format": "int4", "granularty": "per_channel"}}},
            ["unknown key 'scheme.weight.granularty'", "did you mean 'granularity'?"],
        ),
        ({"scheme": {"weigth": {"format": "int4"}}}, ["unknown key 'scheme.weigth'", "did you mean 'weight'?"]),
        ({}, ["scheme", "required"]),
        ({"scheme": "W4A61"}, ["unknown scheme 'W4A61'", "did you mean W4A16?"]),
        ({"scheme": "W4A16", "rules": [{"match": "a", "scheme": "W9"}]}, ["unknown scheme 'W9'", "Known schemes"]),
        ({"scheme": "W4A16", "solver": "gtpq"}, ["unknown solver 'gtpq'", "known solvers: ", "rtn"]),
        ({"scheme": "W4A16", "transforms": ["smooth"]}, ["unknown transform 'smooth'"]),
        ({"scheme": "W4A16", "range": "mes"}, ["unknown range 'mes'", "known ranges: minmax"]),
        ({"scheme": "W4A16", "range": {"name": "mse", "nrom": 2.4}}, ["range 'mse' has no setting 'nrom'"]),
        ({"scheme": "W4A16", "on_indivisible": "pda"}, ["on_indivisible", "'error', 'pad', 'channel' or 'skip'"]),
        ({"scheme": "W4A16", "rules": [{"match": "re:(", "keep": True}]}, ["'re:(' is not a regular expression"]),
        ({"scheme": "W4A16", "rules": [{"match": "", "keep": True}]}, ["rules.0.match", "at least 1 character"]),
        ({"scheme": "W4A16", "rules": [{"match": "a"}]}, ["'a' needs either a scheme or keep: true"]),
        (
            {"scheme": "W4A16", "rules": [{"match": "a", "keep": True, "scheme": "W8A16"}]},
            ["'a' needs either a scheme or keep: true"],
        ),
        ({"scheme": {"weight": {"format": "int99"}}}, ["unknown format 'int99'"]),
        ({"scheme": {"weight": {"format": "int4", "granularity": "per_row"}}}, ["unknown granularity 'per_row'"]),
        (
            {"scheme": {"weight": {"format": "int4", "zero_point": "maybe"}}},
            ["scheme.weight.zero_point", "'none', 'integer', 'real' or 'minimum'"],
        ),
        ({"scheme": {"weight": {"format": "nf4", "restricted": True}}}, ["restricted range means"]),
        ({"scheme": {"name": "own"}}, ["scheme.weight", "required"]),
        ({"scheme": 4}, ["scheme: Input should be a valid string"]),
        ({"scheme": "W4A16", "range": 4}, ["range: Input should be a valid string"]),
    ],
)
def test_bad_settings_are_one_clear_error(settings: dict[str, Any], words: list[str]):
    with pytest.raises(RecipeError) as caught:
        make_recipe(**settings)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert text.startswith("the recipe: ")


@pytest.mark.parametrize("value", ["error", "pad", "channel", "skip"])
def test_every_way_with_indivisible_layers(value: str):
    assert make_recipe(scheme="W4A16", on_indivisible=value).on_indivisible == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scheme: [", "is not YAML"),
        ("- W4A16", "holds no recipe: it needs at least `scheme: NAME`"),
        ("", "holds no recipe"),
        ("scheme: W4A16\nscheem: W8A16\n", "unknown key 'scheem'; did you mean 'scheme'?"),
        ("scheme: W4A16\nrules: down_proj\n", "rules"),
    ],
)
def test_bad_files_name_the_file(tmp_path: Path, text: str, words: str):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_other_encodings(tmp_path: Path):
    with pytest.raises(RecipeError, match="there is no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("scheme: W4A16 # \xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "latin.yaml")


def test_every_error_of_a_recipe_is_a_recipe_error_with_its_cause():
    with pytest.raises(RecipeError) as caught:
        make_recipe(scheme="nope")
    assert not isinstance(caught.value, SchemeError)
    assert caught.value.__cause__ is not None


def test_a_key_given_twice_is_an_error(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: W4A16\nrules: []\nscheme: W8A16\n")
    with pytest.raises(RecipeError, match="'scheme' is given twice"):
        load_recipe(path)


def test_the_first_and_the_last_layer():
    found = names(rules({"match": "@first", "keep": True}, {"match": "@last", "scheme": "W8A16"}))
    assert found["model.layers.0.self_attn.q_proj"] is None
    assert found["lm_head"] == "W8A16"  # embeddings and routers are neither
    assert list(found.values()).count("W4A16") == 4
    turned = [replace(layer, place=-i) for i, layer in enumerate(LAYERS)]  # the order of the model, not of the list
    assert names(rules({"match": "@first", "scheme": "W8A16"}), turned)["lm_head"] == "W8A16"
    with pytest.raises(RecipeError, match="'@last' matches no layer"):
        names(rules({"match": "@last", "keep": True}), LAYERS[:1])
