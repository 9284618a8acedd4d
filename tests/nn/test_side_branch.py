"""A side branch adds a low-rank layer to a packed one, in every shape of layer that peft adapts."""

import pytest
import torch
from fused_networks import ROUNDED_ALIKE, Network, answers, distance, packed
from torch import nn

from lowtide import runtime
from lowtide.checkpoint.adapters import fuse_adapters, loaded_adapters, without_adapters
from lowtide.errors import BadInput
from lowtide.nn.plan import Plan, SidePlan
from lowtide.nn.side_branch import Factors, joined
from lowtide.nn.split import SplitLayer

peft = pytest.importorskip("peft")

# The layer, its input, and the options of its LoRA.
LAYERS = {
    "linear": (lambda: nn.Linear(16, 12), (2, 5, 16), {}),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 6), {}),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 6, 6), {}),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2, padding=2), (2, 8, 6, 6), {}),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6), {}),
    "split": (lambda: SplitLayer(nn.Conv2d(8, 12, 3, padding=1), 5), (2, 8, 6, 6), {}),
    "bias": (lambda: nn.Linear(16, 12), (2, 16), {"lora_bias": True}),
    "rslora": (lambda: nn.Linear(16, 12), (2, 16), {"use_rslora": True}),
}
SAMPLES = 3


def network(kind: str, inputs: int = 32) -> tuple[nn.Module, list[torch.Tensor], dict]:
    torch.manual_seed(0)
    make, shape, options = LAYERS[kind]
    samples = [torch.randn(shape) for _ in range(SAMPLES)]
    model = Network(lambda layers, x, time: layers["layer"](x), layer=make())
    return packed(model.eval(), samples, inputs=inputs), samples, options


def add(model: nn.Module, name: str, **options) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "init_lora_weights": False}
    peft.inject_adapter_in_model(peft.LoraConfig(**config | options), model, name)


def adapted(model: nn.Module):
    return model.layers["layer"]


@pytest.mark.parametrize("kind", LAYERS)
def test_fused_is_beside_and_unfused_is_before(kind):
    model, samples, options = network(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = answers(model, samples)
    add(model, "one", **options)
    add(model, "two", **options | {"r": 8})
    adapted(model).set_adapter(["one", "two"])
    beside = answers(model, samples)
    layer = adapted(model)
    for x, base, found in zip(samples, before, beside, strict=True):
        expected = base
        for name in ("one", "two"):
            scale = layer.scaling[name]
            expected = expected + layer.lora_B[name](layer.lora_A[name](x)) * scale
        assert distance(found, expected) < 1e-6
        assert distance(found, base) > 0.1
    layer.merge()
    for found, expected in zip(answers(model, samples), beside, strict=True):
        assert distance(found, expected) < 1e-6
    layer.unmerge()
    now, _ = without_adapters(model.state_dict(), Plan())
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)
    assert all(map(torch.equal, answers(model, samples), beside))


@pytest.mark.parametrize("inputs", [8, 32])
@pytest.mark.parametrize("kind", ["linear", "conv", "bias"])
def test_a_program_has_the_branch(kind, inputs):
    model, samples, options = network(kind, inputs)
    runtime.fuse(model)
    without = answers(model, samples)
    add(model, "one", **options)
    for fuse in (False, True):
        if fuse:
            adapted(model).merge()
        found = answers(model, samples)
        assert runtime.explain(model)["native"] > 0
        with runtime.plain(model):
            expected = answers(model, samples)
        assert max(map(distance, found, expected)) < ROUNDED_ALIKE
        assert min(map(distance, found, without)) > 0.1


def test_half_precision():
    model, samples, _ = network("conv")
    model.to(torch.bfloat16)
    samples = [sample.to(torch.bfloat16) for sample in samples]
    add(model, "one")
    beside = answers(model, samples)
    adapted(model).merge()
    for found, expected in zip(answers(model, samples), beside, strict=True):
        assert found.dtype == torch.bfloat16
        # The sum is rounded once; an answer near the middle of two values may go the other way.
        assert distance(found, expected) < 2**-8


def test_a_scale_that_half_precision_cannot_hold_is_in_float32():
    down, up = nn.Linear(4, 2, bias=False).half(), nn.Linear(2, 4, bias=False).half()
    kept = Factors.scaled(down, up, 0.5)
    assert kept.up.dtype == torch.float16
    widened = Factors.scaled(down, up, 0.3)
    assert widened.up.dtype == torch.float32
    assert torch.equal(widened.up, up.weight.float() * 0.3)
    assert joined([kept, widened], 1).down.dtype == torch.float32


def test_the_plan_of_a_file_with_branches():
    model, _, _ = network("bias")
    add(model, "one", lora_bias=True)
    adapted(model).merge()
    state, plan = without_adapters(model.state_dict(), Plan())
    assert plan.sides == {"layers.layer": SidePlan(rank=4, bias=True)}
    assert Plan.from_json(plan.to_json()) == plan
    assert "sides" not in Plan().to_json()
    assert sorted(state) == sorted(name for name in state if "lora" not in name)


def test_fusing_into_float_layers_takes_the_layers_of_peft_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.randn(3, 6)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, "one")
    assert loaded_adapters(model) == ["one"]
    beside = model(x)
    fuse_adapters(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert distance(model(x), beside) < 1e-6
    assert loaded_adapters(model) == []


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_the_weight_itself_is_refused(options):
    model, samples, _ = network("linear")
    before = answers(model, samples)
    with pytest.raises(BadInput, match="on a packed model; expected a plain LoRA"):
        add(model, "one", **options)
    assert all(map(torch.equal, answers(model, samples), before))
    add(model, "one")
    with pytest.raises(BadInput):
        add(model, "two", **options)
    assert "two" not in adapted(model).lora_A
