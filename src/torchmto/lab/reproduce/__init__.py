"""The papers' tables and figures: experiments that run resumably and leave numbers, tables and plots in a folder.

A `Recipe` (a YAML file) says what to run: arms, each a comparison of `torchmto.lab.grid`, and a study, which names the tables
(`torchmto.lab.reproduce.tables`) that are made of them. `reproduce` puts both together.
"""

from torchmto.lab.reproduce.recipe import Recipe, RecipeError, load_recipe, recipe_names, with_methods
from torchmto.lab.reproduce.reproduce import reproduce

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_names", "reproduce", "with_methods"]
