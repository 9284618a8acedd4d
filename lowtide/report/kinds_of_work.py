"""The kinds of work in a step of a denoiser, in the order of tables and pictures."""

PRODUCTS = "matrix products"
ATTENTION = "attention"
NORMS = "norms and activations"
TORCH = "other calls of torch"
BETWEEN = "between the calls"
KINDS = (PRODUCTS, ATTENTION, NORMS, TORCH, BETWEEN)
