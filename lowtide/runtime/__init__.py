"""The runtime: a packed denoiser as one program of our kernels, on fixed memory.

fuse(denoiser)       its forward pass runs programs from here on
plain(denoiser)      a context in which it runs layer by layer, as written
kernels_of(denoiser) which kernel each layer got, and why
capture(denoiser)    on a CUDA card, its programs are CUDA graphs from here on
keep_engines(denoiser, kept) each product runs on the engine that an earlier run chose
explain(denoiser)    how many native calls a program has, and what runs in torch, with reasons
"""

from lowtide.runtime.engines import kernel_of, kernels_of
from lowtide.runtime.network import (
    capture,
    explain,
    fuse,
    fused_forward,
    is_fused,
    keep_engines,
    plain,
    unfuse,
)

__all__ = [
    "capture",
    "explain",
    "fuse",
    "fused_forward",
    "is_fused",
    "keep_engines",
    "kernel_of",
    "kernels_of",
    "plain",
    "unfuse",
]
