"""Recipes from keyword arguments and from files, with errors that say what was written and what could have been."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitgrain.errors import RecipeError
from bitgrain.recipes.recipe import Calibration, Experts, Recipe, Rule, Target, Tuning
from bitgrain.recipes.spec_model import ColumnsModel, SchemeModel, SpecModel


def make_recipe(**settings: Any) -> Recipe:
    """A Recipe from keyword arguments, with errors as from a file. Raises RecipeError."""
    return _validate(settings, "the recipe")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe subset, in which a key given twice is an error and not silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def named_recipes() -> dict[str, Path]:
    """The recipes that come with bitgrain, by name: for every scheme, from cheap to accurate."""
    folder = Path(__file__).with_name("named")
    return {name: folder / f"{name}.yaml" for name in ("fast", "balanced", "best", "rptq", "zeroquant", "train")}


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Reads a recipe file, or the one of `named_recipes`; `overrides` replace its top-level keys.

    An override that is a mapping is merged into the file's. Raises RecipeError: no file, no YAML, unknown key (with
    the nearest known one), bad value, or no scheme in either.
    """
    known = named_recipes()
    if not Path(path).is_file():
        if str(path) not in known:
            raise RecipeError(f"there is no recipe file {path}, and no recipe of that name ({', '.join(known)})")
        if "scheme" not in overrides:
            raise RecipeError(f"the recipe {path} holds for every scheme: say which, for instance --scheme W4A16")
        path = known[str(path)]
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds no recipe: it needs at least `scheme: NAME`")
    merged = dict(data)
    for key, value in overrides.items():
        old = data.get(key)
        merged[key] = {**old, **value} if isinstance(value, dict) and isinstance(old, dict) else value
    return _validate(merged, str(path))


def _validate(data: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first problem in one sentence, with a suggestion for a mistyped key."""
    problems = error.errors(include_url=False)
    unknown = [p for p in problems if p["type"] == "extra_forbidden"]
    # where a name or a mapping may stand, pydantic complains about both: the deepest is about what was written
    problem = max(unknown or problems, key=lambda p: len(p["loc"]))
    where = ".".join(str(part) for part in problem["loc"] if str(part) not in ("str", "SchemeModel", "SpecModel"))
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        parts = (Recipe, Rule, SchemeModel, SpecModel, ColumnsModel, Calibration, Experts, Target, Tuning)
        known = sorted({name for part in parts for name in part.model_fields})
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown key {where!r}" + (
            f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
