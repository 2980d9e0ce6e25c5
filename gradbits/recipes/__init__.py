"""One file per paper: a recipe says which quantizer serves which operand of the three products."""

from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe
from gradbits.recipes.registry import RecipeInfo, recipe, recipes

__all__ = ["GradInput", "GradWeight", "Output", "Recipe", "RecipeInfo", "recipe", "recipes"]
