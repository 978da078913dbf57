"""Schemes, their presets, and recipe files."""

from bitgrain.recipes.recipe import Experts, OnIndivisible, Recipe, Rule
from bitgrain.recipes.recipe_file import load_recipe, make_recipe
from bitgrain.recipes.scheme import ALIASES, PRESETS, Scheme, get_scheme

__all__ = [
    "ALIASES",
    "PRESETS",
    "Experts",
    "OnIndivisible",
    "Recipe",
    "Rule",
    "Scheme",
    "get_scheme",
    "load_recipe",
    "make_recipe",
]
