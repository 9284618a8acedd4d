"""Memory on an accelerator: what lies there, what happens where it runs out, and what plan says.

The accelerator is a pretend one, which counts its bytes and can have few of them.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pretend_device
import pytest
import tiny
import tiny_pipelines
import torch
from pretend_device import Held
from torch import nn

import lowtide
from lowtide import sampling
from lowtide.costs.card import BLOCKS, CONTEXT, WHOLE
from lowtide.errors import BadInput
from lowtide.machine import bf16
from lowtide.machine.room import Room
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn.placement import Placement
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import QDrop
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.placing import peak_bytes
from lowtide.stages.stream import Stream

OPTIONS = {"steps": 2, "images": 4, "calibration_steps": 2, "iters": 3, "batch": 4}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The accelerator, without a limit before and after."""
    monkeypatch.setattr(bf16, "time_in_bf16", lambda kind: float("inf"))
    with pretend_device.present() as found:
        gc.collect()
        yield found
    Held.limit = None


def bytes_of(model: nn.Module) -> int:
    return sum(each.nbytes for each in model.parameters())


def test_blocks_lie_on_the_cpu_and_come_when_they_are_called(device) -> None:
    model = tiny.model("unet2d")
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([1, 2])}
    expected = model(**inputs).sample
    adapter = adapt(model)
    before = Held.now
    placement = Placement(model, device, adapter.movable_blocks())
    resident = Held.now - before
    blocks = [bytes_of(model.get_submodule(name)) for name in placement.blocks]
    assert resident == bytes_of(model) - sum(blocks)
    Held.reset()
    with torch.no_grad():
        answer = model(**{name: value.to(device) for name, value in inputs.items()}).sample
    assert torch.equal(answer.cpu(), expected)
    # The largest block, and values, which are few here; never two blocks.
    assert max(blocks) < Held.most - before - resident < max(blocks) + sorted(blocks)[-2]
    placement.end()
    assert {each.device for each in model.parameters()} == {device}


def test_what_the_device_changes_goes_home_and_the_rest_is_not_copied(device) -> None:
    model = tiny.model("unet2d")
    placement = Placement(model, device, adapt(model).movable_blocks())
    block = model.get_submodule(placement.blocks[0])
    before = dict(block.named_parameters())
    with placement.visit(block), torch.no_grad():
        block.conv1.weight.add_(1)
    after = dict(block.named_parameters())
    changed = [name for name, each in after.items() if each is not before[name]]
    assert changed == ["conv1.weight"]
    assert torch.equal(after["conv1.weight"], before["conv1.weight"] + 1)


def test_a_visit_inside_of_a_visit_does_not_end_it(device) -> None:
    model = tiny.model("unet2d")
    placement = Placement(model, device, adapt(model).movable_blocks())
    block = model.get_submodule(placement.blocks[0])
    with placement.visit(block):
        with placement.visit(block.conv1):
            pass
        assert {each.device for each in block.parameters()} == {device}
    assert {each.device for each in block.parameters()} == {CPU}


def test_text_encoder_and_decoder_are_on_the_device_only_while_they_work(
    device, tmp_path: Path
) -> None:
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    pipe.unet.to(device)
    request = sampling.Request(steps=2, seeds=(1,), prompts=("a",))
    places: list[set[torch.device]] = []

    def look(module: nn.Module, args: object) -> None:
        others = sampling.other_parts(pipe).values()
        places.append({each.device for part in others for each in part.parameters()})

    with sampling.parts_apart(pipe, device):
        hook = pipe.unet.register_forward_pre_hook(look)
        images = sampling.images(pipe, request)
        hook.remove()
    assert places == [{CPU}, {CPU}]
    assert {each.device for each in pipe.vae.parameters()} == {device}
    assert np.array_equal(sampling.images(pipe, request), images)


@pytest.mark.parametrize("place", [WHOLE, BLOCKS])
@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_a_run_takes_no_more_than_is_reckoned(kind: str, place: str, device, tmp_path: Path):
    """Weights and values that are counted here; a context and its libraries are not."""
    folder = tmp_path / "model"
    tiny_pipelines.PIPELINES[kind](tmp_path).save_pretrained(folder)
    options = OPTIONS | tiny_pipelines.request_fields(kind)
    estimate = lowtide.plan(folder, method="tfmq", device="pretend", place=place, **options)
    before = Held.now
    Held.reset()
    lowtide.quantize(folder, method="tfmq", device="pretend", place=place, **options)
    taken = Held.most - before
    reckoned = estimate.card.peak_bytes - CONTEXT
    assert estimate.card.place == place
    # A test model's own buffers weigh more than a full one's, so a third is allowed on top.
    assert 0.2 * reckoned < taken < 1.33 * reckoned


def test_the_model_is_placed_by_the_free_memory(device, tmp_path: Path) -> None:
    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "model")
    options = OPTIONS | {"method": "minmax", "device": "pretend"}
    del options["iters"], options["batch"], options["calibration_steps"]
    assert lowtide.quantize(tmp_path / "model", **options).report["place"] == WHOLE
    gc.collect()
    pipe = sampling.load_pipeline(tmp_path / "model")
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(steps=2, images=4), "minmax")
    Held.limit = Held.now + round(peak_bytes(job, (Collect(),), WHOLE)) // 2 + CONTEXT // 4
    assert lowtide.quantize(tmp_path / "model", **options).report["place"] == BLOCKS


def test_a_place_on_the_cpu_is_refused() -> None:
    with pytest.raises(BadInput, match="found place 'blocks' on the CPU"):
        lowtide.quantize(tiny.model("unet2d"), method="minmax", steps=2, images=2, place="blocks")


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def narrow(model: nn.Module, most: int, *, learning: bool = False) -> list[int]:
    """Let the model's blocks run out of memory above so many samples; the sizes that they saw.

    learning: only while they learn. A search for ranges draws other samples of values in parts.
    """
    sizes: list[int] = []

    def check(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].is_meta:  # a recording of shapes alone takes no memory
            return
        sizes.append(len(args[0]))
        if len(args[0]) > most and (torch.is_grad_enabled() or not learning):
            raise torch.OutOfMemoryError(f"out of memory at {len(args[0])} samples")

    for name in adapt(model).movable_blocks():
        model.get_submodule(name).register_forward_pre_hook(check)
    return sizes


def check_alike(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    """The losses of units: the first one's before learning to an error of sums, all others to 5 %.

    Adam's first steps have the size of the rate whatever the gradient is, so that an error of sums
    in a gradient near zero moves a weight the other way.
    """
    assert ours.keys() == theirs.keys()
    first = next(iter(ours))
    assert ours[first][0] == pytest.approx(theirs[first][0], rel=1e-5)
    for name, pair in ours.items():
        assert pair == pytest.approx(theirs[name], rel=5e-2), name


@pytest.mark.parametrize(("method", "learning"), [("tfmq", False), ("efficientdm", True)])
def test_a_run_that_is_short_of_memory_gives_what_a_run_with_enough_gives(
    method: str, learning: bool, capfd
):
    """Of three iterations at a rate far above the papers', which let an error of sums grow."""
    results = []
    for most in (64, 1):
        model = tiny.model("unet2d")
        sizes = narrow(model, most, learning=learning)
        pipe = sampling.as_pipeline(model)
        results.append(lowtide.quantize(pipe, method=method, **relevant_options(method, OPTIONS)))
        assert (max(sizes) > most) == (most == 1)
    check_alike(*(result.report["losses"] for result in results))
    lines = [line for line in capfd.readouterr().err.splitlines() if "samples at once" in line]
    assert len(lines) == 1


@pytest.mark.parametrize("drop", [None, 0.5])
def test_a_units_gradients_in_parts_are_those_of_the_whole(drop: float | None) -> None:
    """Of every unit, also where values are dropped at random; to the error of sums."""
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    settings = Settings(steps=2, images=4, calibration_steps=2, batch=4, drop=drop)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test")
    run_recipe((Collect(), Assign(), FitWeights("minmax"), FitRanges("minmax")), job)
    units = 0
    for data in Stream(job, inputs_quantized=True, temporal=True).walk():
        roundings = [
            module.start_rounding()
            for module in data.module.modules()
            if isinstance(module, QuantizedLayer) and module.format
        ]
        with torch.no_grad():
            for each in roundings:
                each.weight.mul_(1.1)  # at the start the answers are right, and gradients are noise
        found = []
        for part in (None, 3, 1):
            job.room.part = part
            dropping = None if drop is None else QDrop(drop, torch.Generator().manual_seed(1))
            loss = data.loss(torch.Generator().manual_seed(2), dropping)
            assert loss.requires_grad == (part is None)
            if loss.requires_grad:
                loss.backward()
            found.append((loss.item(), [each.take_gradient().clone() for each in roundings]))
        whole, gradients = found[0]
        for value, theirs in found[1:]:
            assert value == pytest.approx(whole, rel=1e-5), data.unit.name
            pairs = zip(theirs, gradients, strict=True)
            assert max(far(ours, expected) for ours, expected in pairs) < 1e-3, data.unit.name
        for module in data.module.modules():
            if isinstance(module, QuantizedLayer):
                module.rounding = None
        units += 1
    assert units > 8


def test_images_that_are_drawn_in_parts_are_the_same(tmp_path: Path, capfd) -> None:
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    request = sampling.Request(steps=2, seeds=(1, 2, 3), prompts=("a", "b"), batch=3)
    expected = sampling.images(pipe, request)
    moments = list(sampling.trajectory(pipe, request))
    narrow(pipe.unet, 2)
    images = sampling.images(pipe, request)
    assert np.abs(images - expected).max() < 1e-5
    parts = list(sampling.trajectory(pipe, request, room=Room(CPU, lambda line: None)))
    assert [each.t.tolist() for each in parts] == [each.t.tolist() for each in moments]
    for ours, theirs in zip(parts, moments, strict=True):
        assert far(ours.eps, theirs.eps) < 1e-5
        for name, value in theirs.arguments.items():
            if isinstance(value, torch.Tensor):
                assert far(ours.arguments[name], value) < 1e-5, name
    assert "ran out with 3 samples at once" in capfd.readouterr().err


def test_a_single_image_that_does_not_fit_is_one_sentence() -> None:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    narrow(pipe.unet, 0)
    with pytest.raises(BadInput, match="too little memory on cpu for a single sample"):
        sampling.images(pipe, sampling.Request(steps=2, seeds=(1, 2)))


def test_a_model_in_half_precision_learns_as_well() -> None:
    """The losses after learning, as a share of those before, differ by a twentieth at most."""
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = sampling.as_pipeline(tiny.model("unet-class").to(dtype))
        job = lowtide.quantize(pipe, method="tfmq", labels=(1, 2), **OPTIONS | {"iters": 40})
        losses = [value for name, value in job.report["losses"].items() if "Reconstruct" in name]
        shares.append(np.mean([min(1, after / before) for before, after in losses]))
    assert abs(shares[1] - shares[0]) < 0.05


def test_a_part_of_the_work_can_be_recorded(device) -> None:
    """Collect alone, block by block: the calls are on the CPU."""
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(steps=2, images=2), "test")
    job.placement = Placement(pipe.unet, device, job.adapter.movable_blocks())
    run_recipe((Collect(),), job)
    assert {call.arguments["sample"].device for call in job.calls} == {CPU}
