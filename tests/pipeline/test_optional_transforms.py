"""Transforms that a recipe wants only for some schemes, or only where the model allows them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zoo
from bitgrain.errors import ModelError
from calibrated_jobs import recipe_of, run

pytestmark = pytest.mark.usefixtures("device")

Make = Callable[..., Path]
ROTATE = {"name": "rotate", "optional": True}
SMOOTH = {"name": "smoothquant", "pairs": "linear"}


def job(text: Path, *transforms: Any, scheme: str = "W8A8") -> Any:
    return recipe_of("fast", text, scheme, transforms=list(transforms))


def weights(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in zoo.contents(out).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_what_a_model_refuses_is_left_out_and_told(readable: Make, text: Path, tmp_path: Path, name: str):
    with pytest.raises(ModelError, match="cannot be rotated"):
        run(readable(name), tmp_path / "strict", job(text, "rotate", SMOOTH))
    told = run(readable(name), tmp_path / "told", job(text, ROTATE, SMOOTH)).manifest
    assert any("rotate is left out" in note and "cannot be rotated" in note for note in told["notes"])
    run(readable(name), tmp_path / "without", job(text, SMOOTH))
    assert weights(tmp_path / "told") == weights(tmp_path / "without")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt-oss"])
def test_what_a_model_allows_is_applied(readable: Make, text: Path, tmp_path: Path, name: str):
    told = run(readable(name), tmp_path / "optional", job(text, ROTATE, SMOOTH)).manifest
    assert not any("left out" in note for note in told["notes"])
    run(readable(name), tmp_path / "strict", job(text, "rotate", SMOOTH))
    assert weights(tmp_path / "optional") == weights(tmp_path / "strict")


def test_a_scheme_that_does_not_want_it(readable: Make, text: Path, tmp_path: Path):
    result = run(readable("llama"), tmp_path / "out", job(text, {"name": "rotate", "when": "inputs"}, scheme="W4A16"))
    assert result.plan.recipe.transforms == ()
    assert "transforms" not in result.manifest
