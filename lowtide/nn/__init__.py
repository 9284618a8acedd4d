"""Quantized layers before and after packing, the clock they read, and how they take a float layer's place."""
