"""What the native kernels cover: a function for each function of torch and each packed layer."""

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.nn.feature_cache import Cached
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.runtime.arithmetic import add, divide, multiply
from lowtide.runtime.features import cached_features
from lowtide.runtime.lowering import Cover
from lowtide.runtime.native_attention import attention
from lowtide.runtime.norms import activation, group_norm, layer_norm
from lowtide.runtime.products import conv, linear
from lowtide.runtime.shapes import contiguous, dropout, interpolate, join, pad

ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, operator.add)
MULTIPLIES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, operator.mul)
DIVIDES = (torch.div, Tensor.div, Tensor.__truediv__, operator.truediv)
JOINS = (torch.cat, torch.concat)

COVERS: Mapping[Callable | type, Cover] = {
    Cached: cached_features,
    PackedConv2d: conv,
    PackedLinear: linear,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
    F.silu: activation,
    F.gelu: activation,
    F.dropout: dropout,
    Tensor.contiguous: contiguous,
    F.interpolate: interpolate,
    F.pad: pad,
    F.scaled_dot_product_attention: attention,
    **dict.fromkeys(JOINS, join),
    **dict.fromkeys(ADDS, add),
    **dict.fromkeys(MULTIPLIES, multiply),
    **dict.fromkeys(DIVIDES, divide),
}
