"""Packed layers and attentions on Triton operators, against the plain operators.

Without a CUDA card, the denoiser stays on the CPU and the kernels run in Triton's interpreter.
"""

import pytest
import torch
from fused_networks import Network, packed
from tiny import MODELS
from torch import Tensor, nn
from triton_layers import DEVICE, distance

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources

from lowtide.formats import Adaptive, Affine, Mixed, mse
from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import Clock
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_twin
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer, input_format
from lowtide.nn.swap import packed_layers
from lowtide.runtime import kernel_of, on_gpu
from lowtide.runtime.on_gpu import GpuAttention, GpuLayer, GpuLayers, RunningStep

TIMESTEPS = (900, 500, 100)
LAYERS = {
    "linear": (lambda: nn.Linear(37, 12), (4, 37)),
    "sequence": (lambda: nn.Linear(40, 12, bias=False), (3, 5, 40)),
    "conv": (lambda: nn.Conv2d(9, 12, 3, padding=1), (2, 9, 6, 5)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=(2, 1)), (1, 8, 7, 6)),
}
FORMATS = [Affine(8, signed=True, axis=0), Affine(4, axis=0), Mixed((2, 3, 8) * 4)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Where there is no card, the interpreter takes its place."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(on_gpu, "missing", lambda device: "")


def built(
    kind: str, form: Affine | Mixed, *, bits: int = 8, smooth: bool = False
) -> tuple[PackedLinear | PackedConv2d, Tensor, Clock]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    clock = Clock(TIMESTEPS, rows=1, per_step=True)
    quantizer = Quantizer(input_format(bits), clock, per_step=True)
    quantized = quantized_layer(make(), form, quantizer)
    if smooth:
        quantized.smooth = torch.rand(shape[1 if kind != "sequence" else 2]) + 0.5
    low, high = mse(quantized.format.rows(quantized.weight.detach()), form)
    quantized.set_grid(form.params(low, high, quantized.weight.shape[0]))
    if bits == 8:
        quantizer.fit(torch.tensor([-2.0, -0.5, 0.0]), torch.tensor([3.0, 2.0, 1.0]))
    return packed_twin(quantized).to(DEVICE), torch.randn(shape, device=DEVICE), clock.to(DEVICE)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_every_step_agrees_with_the_operator(kind, form, smooth):
    layer, x, clock = built(kind, form, smooth=smooth)
    step = RunningStep(clock)
    assert on_gpu.unsupported(layer) == []
    product = GpuLayer(layer, step)
    for timestep in TIMESTEPS:
        clock.set(timestep)
        step.take()
        expected = layer(x)
        found = product(x)
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-6


@torch.no_grad()
def test_a_kernel_that_does_not_fit_on_the_card_leaves_the_layer_to_torch(monkeypatch):
    layer, x, clock = built("conv", FORMATS[1])
    expected = layer(x)
    product = GpuLayer(layer, RunningStep(clock))

    def refuse(*_) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(product.operators, "triton_conv2d", refuse)
    layer.product = product
    with pytest.warns(UserWarning, match="runs in plain torch: its Triton kernel failed"):
        found = layer(x)
    assert torch.equal(found, expected)
    assert kernel_of(layer).startswith("plain torch: its Triton kernel failed (out of resource")
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_the_step_is_read_where_it_lies():
    """The same operands: only the content of the index changes, as in a captured graph."""
    layer, x, clock = built("conv", FORMATS[1])
    step = RunningStep(clock)
    clock.set(900)
    step.take()
    product = GpuLayer(layer, step)
    at = step.now.data_ptr()
    before = product(x)
    clock.set(100)
    step.take()
    assert step.now.data_ptr() == at
    assert not torch.equal(product(x), before)


@torch.no_grad()
def test_samples_at_steps_of_their_own():
    layer, x, clock = built("sequence", FORMATS[1])
    step = RunningStep(clock)
    clock.set(torch.tensor([100, 900, 500]))
    step.take()
    assert distance(GpuLayer(layer, step)(x), layer(x)) < 1e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
@torch.no_grad()
def test_inputs_in_float(form):
    layer, x, clock = built("linear", form, bits=16)
    product = GpuLayer(layer, RunningStep(clock))
    assert product(x) is None
    expected = layer(x.half().float())
    assert distance(product(x.half()), expected) < 1e-3


@torch.no_grad()
def test_the_layer_holds_one_copy_of_its_codes_and_gives_those_of_the_checkpoint():
    for form in FORMATS:
        layer, x, _ = built("conv", form)
        saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        expected = layer(x)
        weight = layer.hold_resident()
        assert layer.weight.nbytes == weight.nbytes
        pointers = {segment.data.untyped_storage().data_ptr() for segment in weight.segments}
        assert pointers == {layer.weight.untyped_storage().data_ptr()}
        assert torch.equal(layer(x), expected)
        assert all(torch.equal(layer.state_dict()[name], saved[name]) for name in saved)
        layer.load_state_dict(saved)
        assert layer.resident is None
        assert torch.equal(layer.weight, saved["weight"])


REFUSED = {
    "grouped": (nn.Conv2d(8, 8, 3, groups=2), 8, "in 2 groups"),
    "padded by name": (nn.Conv2d(8, 8, 3, padding="same"), 8, "its padding is same"),
    "wide window": (nn.Conv2d(8, 8, 5), 8, "25 pixels, more than 16"),
    "float image": (nn.Conv2d(8, 8, 3), 16, "its inputs are in float"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_layer_says_why(kind, monkeypatch):
    layer, bits, reason = REFUSED[kind]
    monkeypatch.setitem(LAYERS, kind, (lambda: layer, (1, 8, 7, 7)))
    packed, _, _ = built(kind, FORMATS[1], bits=bits)
    [found] = on_gpu.unsupported(packed)
    assert reason in found
    assert on_gpu.kernel_name(packed) == f"plain torch: {found}"


def test_without_a_card_or_triton_the_reason_says_so(monkeypatch):
    monkeypatch.undo()
    packed, _, _ = built("linear", FORMATS[1])
    if DEVICE.type == "cpu":
        assert on_gpu.unsupported(packed) == ["Triton kernels run on CUDA, not on cpu"]
    else:
        assert on_gpu.unsupported(packed) == []
        assert kernel_of(packed).startswith("Triton, 4 bits")


@torch.no_grad()
def test_one_operator_for_each_layer_in_a_compiled_graph():
    layer, x, clock = built("conv", FORMATS[1])
    step = RunningStep(clock)
    step.take()
    layer.product = GpuLayer(layer, step)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)


@torch.no_grad()
def test_operators_know_the_shape_of_their_result():
    for kind in LAYERS:
        layer, x, clock = built(kind, FORMATS[2])
        product = GpuLayer(layer, RunningStep(clock))
        arguments = (x, product.tensors, product.numbers, product.grid(), product.top, layer.bias)
        shape = (product.shape,) if product.shape else ()
        operator = product.operators.triton_conv2d if shape else product.operators.triton_linear
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, (*arguments, *shape), test_utils=checks)


def processor(softmax: Affine | Adaptive) -> tuple[QuantAttention, Clock]:
    clock = Clock(TIMESTEPS, rows=4, per_step=True)
    forms = {"q": Affine(8), "k": Affine(8), "v": Affine(8), "softmax": softmax}
    parts = {
        name: Quantizer(form, clock, row, per_step=True)
        for row, (name, form) in enumerate(forms.items())
    }
    for name, part in parts.items():
        peaks = (
            torch.tensor([0.5, 0.7, 1.0]) if name == "softmax" else torch.tensor([2.0, 3.0, 4.0])
        )
        part.fit(torch.zeros(3) if name == "softmax" else -peaks, peaks)
        part.enabled = True
    if isinstance(softmax, Adaptive):
        clock.zero[3, 1] = 1
        clock.scale[3, 1] = 0.7
    block = MODELS["dit"]().transformer_blocks[0].attn1
    quantized = QuantAttention(block.processor, parts)
    return quantized, clock.to(DEVICE)


@pytest.mark.parametrize("softmax", [Affine(8), Adaptive(4)], ids=str)
@pytest.mark.parametrize("mask", ["none", "bias", "boolean"])
@torch.no_grad()
def test_attention_agrees_with_the_plain_one(softmax, mask):
    torch.manual_seed(0)
    attention, clock = processor(softmax)
    step = RunningStep(clock)
    fast = GpuAttention(attention, step)
    q, k, v = (torch.randn(2, 2, tokens, 16, device=DEVICE) for tokens in (5, 9, 9))
    bias = torch.randn(2, 1, 1, 9, device=DEVICE)
    given = {"none": None, "bias": bias, "boolean": bias < 0.5}[mask]
    for timestep in TIMESTEPS:
        clock.set(timestep)
        step.take()
        expected = attention.attend(q, k, v, given)
        # A share of the softmax that lies at a tie may get the neighbouring code.
        assert distance(fast(q, k, v, given), expected) < 1e-3


@torch.no_grad()
def test_a_whole_network_runs_on_the_kernels_and_back():
    network = Network(
        lambda layers, x, time: layers["last"](
            (layers["first"](x) + layers["time"](time)[:, :, None, None]).relu()
        ),
        first=nn.Conv2d(3, 8, 3, padding=1),
        time=nn.Linear(16, 8),
        last=nn.Conv2d(8, 4, 3, groups=2, padding=1),
    )
    samples = [torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))]
    model = packed(network.eval(), samples).to(DEVICE)
    sample = samples[0].to(DEVICE)
    expected = model(sample, torch.tensor(500))
    layers = GpuLayers(model)
    names = {name for name, _ in packed_layers(model)}
    assert set(layers.reasons) == {"layers.last"}
    assert len(layers.layers) == len(names) - 1
    with layers.running():
        found = model(sample, torch.tensor(500))
    assert distance(found, expected) < 1e-5
    assert all(layer.product is None for layer in layers.layers)
    assert not layers.is_stale()
    model.load_state_dict(model.state_dict())
    assert layers.is_stale()
    assert torch.equal(model(sample, torch.tensor(500)), expected)


def test_attention_that_has_no_kernel():
    attention, clock = processor(Affine(8))
    fast = GpuAttention(attention, RunningStep(clock))
    q = torch.randn(1, 1, 4, 16, device=DEVICE)
    assert fast(q, q, q, None, 0.0, True) is None
    assert fast(q, q, q, dropout_p=0.1) is None
    assert fast(q, q, q, enable_gqa=True) is None
    assert fast(q, q, q, enable_gqa=False) is not None
    attention.k.format = None
    attention.v.per_step = False
    reasons = on_gpu.unsupported_attention(attention, DEVICE)
    assert reasons == [
        "its k are not on an affine grid",
        "only some of its operands have a range for each step",
    ]
