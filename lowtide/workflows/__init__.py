"""Whole tasks of the command line: quantize to a folder, run a recipe, compare methods, demo."""
