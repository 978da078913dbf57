"""Transforms as recipes list them."""

import pytest

from bitgrain.errors import RecipeError, SchemeError
from bitgrain.recipes import get_scheme, make_recipe
from bitgrain.recipes.steps import read_step


def test_settings_reach_the_transform():
    step = read_step({"name": "rotate", "r2": False, "when": "inputs", "optional": True})
    assert (step.name, step.when, step.optional) == ("rotate", "inputs", True)
    assert step.transform == read_step({"name": "rotate", "r2": False}).transform
    plain = read_step("rotate")
    assert (plain.when, plain.optional) == ("always", False)


@pytest.mark.parametrize(
    ("when", "wanted"),
    [
        ("always", ["W4A16", "FP8_DYNAMIC", "W8A8", "W4A4"]),
        ("inputs", ["FP8_DYNAMIC", "W8A8", "W4A4"]),
        ("integer_inputs", ["W8A8", "W4A4"]),
        ("int8_inputs", ["W8A8"]),
        ("int4_inputs", ["W4A4"]),
    ],
)
def test_when(when: str, wanted: list[str]):
    steps = ({"name": "rotate", "when": when}, "fold_norms")
    for name in ("W4A16", "FP8_DYNAMIC", "W8A8", "W4A4"):
        recipe = make_recipe(scheme=name, transforms=steps).for_schemes([None, get_scheme(name)])
        assert recipe.transforms == (steps if name in wanted else steps[1:])
    assert make_recipe(scheme="W4A16", transforms=steps[:1]).for_schemes([None]).transforms == (
        steps[:1] if when == "always" else ()
    )


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"name": "rotate", "when": "never"}, "int4_inputs, not 'never'"),
        ({"name": "rotate", "optional": "yes"}, "true or false, not 'yes'"),
        ({"name": "rotat", "optional": True}, "unknown transform 'rotat'"),
        ({"optional": True}, "unknown transform None"),
        ({"name": "rotate", "wen": "inputs"}, "wen"),
    ],
)
def test_bad_steps(choice: dict[str, object], says: str):
    with pytest.raises(SchemeError, match=says):
        read_step(choice)
    with pytest.raises(RecipeError, match=says):
        make_recipe(scheme="W4A16", transforms=[choice])
