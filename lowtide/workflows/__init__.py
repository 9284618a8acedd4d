"""Whole tasks of the command line: quantize into a folder, run a recipe file, compare methods, the demo."""
