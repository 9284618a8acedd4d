"""Quantized layers before and after packing, their clock, and how they replace float layers."""
