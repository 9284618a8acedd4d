"""torch.compile on packed denoisers: one graph without breaks, none again from step to step."""

from collections.abc import Iterator

import lora_files
import pytest
import tiny_pipelines
import torch
from fused_networks import distance
from torch import Tensor, nn

import lowtide
from lowtide.formats import Affine, minmax
from lowtide.kernels import conv2d
from lowtide.methods import relevant_options
from lowtide.nn.clock import Clock
from lowtide.nn.packed import packed_twin
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer, input_format

QUICK = {"steps": 3, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
PAIRS = [("ldm", "tfmq"), ("dit", "temporal_cache"), ("ddim", "best")]


def denoiser(name: str, method: str, folder) -> tuple[nn.Module, list[tuple[tuple, dict]]]:
    """A packed denoiser, and its calls at all timesteps while a pipeline draws."""
    pipe = tiny_pipelines.PIPELINES[name](folder)
    request = tiny_pipelines.request_fields(name)
    model = lowtide.quantize(pipe, method=method, **relevant_options(method, QUICK | request)).model
    calls: list[tuple[tuple, dict]] = []
    hook = model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    lowtide.images(pipe, lowtide.Request(steps=3, seeds=(5, 6), batch=2, **request))
    hook.remove()
    return model, calls


def answer(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture(autouse=True)
def compiled_once() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_one_graph_runs_every_step(name, method, tmp_path):
    model, calls = denoiser(name, method, tmp_path)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for args, kwargs in calls:
            found = answer(compiled(*args, **kwargs))
            with lowtide.unfused(model):
                expected = answer(model(*args, **kwargs))
            assert distance(found, expected) < 1e-5


@pytest.mark.slow
def test_a_lora_is_fused_and_unfused_through_the_compiler(tmp_path):
    """A branch is another graph, so the compiler is allowed to compile again."""
    pytest.importorskip("peft")
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    options = {"steps": 1, "images": 1, "size": 8, "prompts": ("a",)}
    factors = lora_files.random_lora(pipe.unet)
    unet = lowtide.quantize(pipe, method="minmax", **options).model
    sample = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 16, 32)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")

    def check() -> Tensor:
        with torch.no_grad(), lowtide.unfused(unet):
            expected = answer(unet(*sample))
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
            found = answer(compiled(*sample))
        assert torch.equal(found, expected)
        return found

    before = check()
    lora_files.load(pipe, lora_files.peft_layout(factors))
    pipe.fuse_lora()
    assert distance(check(), before) > 0.01
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(check(), before)


def test_compiled_blocks_run_in_the_place_of_a_program(tmp_path):
    """A program of the whole denoiser would pass over the blocks that were compiled."""
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    options = {"steps": 1, "images": 1, "size": 8, "prompts": ("a",)}
    unet = lowtide.quantize(pipe, method="minmax", **options).model
    sample = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 16, 32)
    # Blocks of one class share their code, so the compiler takes each size of theirs for a change.
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        with lowtide.unfused(unet):
            expected = answer(unet(*sample))
        answer(unet(*sample))  # a program is prepared before
        graphs = []
        unet.compile_repeated_blocks(
            fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph
        )
        with pytest.warns(UserWarning, match="torch.compile compiled parts of it"):
            found = answer(unet(*sample))
    assert len(graphs) > 0
    assert torch.equal(found, expected)


def test_an_unknown_timestep_gives_nan_everywhere(tmp_path):
    """An error cannot be raised from within a compiled graph, and a wrong picture must not come."""
    model, calls = denoiser("ddim", "tfmq", tmp_path)
    args, _ = calls[-1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for step, is_unknown in ((0.0, False), (0.3, False), (-3.0, True)):
        with torch.no_grad():
            found = answer(compiled(args[0], torch.as_tensor(args[1]) + step))
        assert found.isnan().all() == is_unknown
        assert found.isnan().any() == is_unknown


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (1, 1), (3, 2)])
def test_the_compiler_knows_the_strides_of_a_convolution(layout, kernel, groups):
    torch.manual_seed(0)
    clock = Clock((1,), rows=1)
    quantizer = Quantizer(input_format(8), clock)
    layer = quantized_layer(nn.Conv2d(6, 8, kernel, groups=groups), Affine(4, axis=0), quantizer)
    low, high = minmax(layer.format.rows(layer.weight.detach()), layer.format)
    layer.set_grid(layer.format.params(low, high, 8))
    packed = packed_twin(layer)
    for x in (torch.randn(2, 6, 7, 5), torch.randn(2, 6, 7, 5)[:, :, ::2]):
        x = x.contiguous(memory_format=layout)
        shape = packed.shape
        _, tables, step = packed.operands(x)
        given = (x, packed.codes(), tables, step, packed.spec, packed.bias, shape)
        torch.library.opcheck(conv2d, given, test_utils=("test_schema", "test_faketensor"))
