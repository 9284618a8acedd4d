"""Exports: a packed checkpoint in the form of another runtime, one file for each.

targets.py     `lowtide.export`, which the others serve
traceable.py   a packed denoiser as a graph of plain operators, which converters can follow
"""
