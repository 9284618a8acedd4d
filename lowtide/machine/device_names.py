"""The names of devices as a user writes them. This module imports nothing heavy."""

AUTO = "auto"
KINDS = ("cpu", "cuda", "mps", "xpu")
EXAMPLE = "cuda:1"
