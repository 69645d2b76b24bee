"""Recipes: one file an experiment, `get_config(preset)`."""
