"""What a method may spend: gradient steps times the layers that they run through.

Learning block by block and learning the whole network get the same number of forward passes with a
gradient for each layer, so that a table with one `iters` compares methods of the same budget.
"""

from collections import Counter

import pytest
import tiny
import torch
from torch import Tensor

import lowtide
from lowtide import sampling
from lowtide.methods import relevant_options
from lowtide.nn.quantized import QuantizedLayer

ITERS = 3
OPTIONS = {"weights": 3, "inputs": 6, "steps": 4, "images": 4, "batch": 4, "iters": ITERS}
# TIAR reads temporal features alone, a small part of the network, and spends more on them.
TEMPORAL_PASSES = 5


def passes_by_layer(method: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each layer ran forward with a weight that learns."""
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    names: dict[int, str] = {}
    counts: Counter[str] = Counter()
    plain = QuantizedLayer.effective_weight

    def counted(self: QuantizedLayer) -> Tensor:
        if self.rounding is not None and torch.is_grad_enabled():
            names.update({id(each): name for name, each in pipe.unet.named_modules()})
            counts[names[id(self)]] += 1
        return plain(self)

    monkeypatch.setattr(QuantizedLayer, "effective_weight", counted)
    lowtide.quantize(pipe, method=method, **relevant_options(method, OPTIONS))
    return counts


def is_temporal(name: str) -> bool:
    return name.startswith("time_embedding") or name.endswith("time_emb_proj")


@pytest.mark.parametrize(
    ("method", "temporal"),
    [("qdiffusion", 1), ("tfmq", TEMPORAL_PASSES), ("efficientdm", 1), ("mpq", 1)],
)
def test_every_layer_gets_one_pass_in_each_iteration(method, temporal, monkeypatch):
    counts = passes_by_layer(method, monkeypatch)
    assert len(counts) > 20
    expected = {name: ITERS * (temporal if is_temporal(name) else 1) for name in counts}
    assert counts == expected


def test_best_spends_twice_as_much_at_few_bits(monkeypatch):
    """It distils what it has reconstructed; docs/methods/best.md says so."""
    counts = passes_by_layer("best", monkeypatch)
    twice = {name for name, count in counts.items() if count == 2 * ITERS}
    assert {name for name in counts if not is_temporal(name)} <= twice
