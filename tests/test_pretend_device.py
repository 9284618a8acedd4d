"""The pretend accelerator behaves as a device does: memory, views, shapes, errors, gradients."""

import copy
import gc
from collections.abc import Callable, Iterator

import pretend_device
import pytest
import tiny
import torch
from pretend_hooks import Presence
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from lowtide.models import ARCHITECTURES, answer_of
from lowtide.models.trace import mapped


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with pretend_device.present() as found:
        yield found


def grid() -> Tensor:
    return torch.arange(12.0).reshape(3, 4)


def test_a_moved_tensor_keeps_values_strides_and_type(device) -> None:
    for tensor in (grid(), grid().t(), grid()[:, 1:3], grid().bfloat16(), grid() > 5, grid()[0, 0]):
        moved = tensor.to(device)
        assert moved.device == device
        assert moved.dtype == tensor.dtype
        assert moved.stride() == tensor.to("cpu", copy=True).stride()
        assert torch.equal(moved.cpu(), tensor)


def test_moving_copies(device) -> None:
    tensor = grid()
    moved = tensor.to(device)
    tensor.zero_()
    moved.add_(1)
    assert torch.equal(moved.cpu(), grid() + 1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "row": lambda x: x[1],
    "column": lambda x: x[:, 1],
    "flat": lambda x: x.view(-1),
    "every second": lambda x: x[::2, 1::2],
    "expanded": lambda x: x[:, :1].expand(3, 4),
    "windows": lambda x: x.unfold(0, 2, 1),
    "diagonal": lambda x: x.diagonal(),
    "strided": lambda x: x[1:].as_strided((2, 2), (4, 1), 5),
    "other type": lambda x: x.view(torch.int32),
    "view of a view": lambda x: x[1:].t()[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shares_memory_and_lies_as_on_the_cpu(name: str, device) -> None:
    expected_base = grid()
    expected = VIEWS[name](expected_base)
    base = grid().to(device)
    view = VIEWS[name](base)
    assert (view.stride(), view.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert view._is_view() == expected._is_view()
    for tensor in (expected_base, base):
        tensor.mul_(3)
    assert torch.equal(view.cpu(), expected)


def test_what_is_written_to_a_view_is_in_its_base(device) -> None:
    base = grid().to(device)
    base.t()[1:][0] = 7
    assert base[:, 1].tolist() == [7, 7, 7]
    assert base[:, 2].tolist() == [2, 6, 10]


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "transpose": lambda x: x.t_(),
    "add an axis": lambda x: x.unsqueeze_(0),
    "drop an axis": lambda x: x.unsqueeze_(0).squeeze_(0),
    "shrink": lambda x: x.resize_(2, 2),
    "other strides": lambda x: x.as_strided_((2, 2), (1, 4)),
    "written rows": lambda x: x[1:].mul_(3),
    "by a mask": lambda x: x.masked_fill_(x > 5, 1),
    "by places": lambda x: x.index_put_((torch.tensor([0, 2], device=x.device),), x[1] + 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_change_in_place_is_that_of_the_cpu(name: str, device) -> None:
    expected = grid()
    changed = grid().to(device)
    IN_PLACE[name](expected)
    IN_PLACE[name](changed)
    assert (changed.shape, changed.stride()) == (expected.shape, expected.stride())
    assert torch.equal(changed.cpu(), expected)


def test_a_change_in_place_returns_the_tensor_itself(device) -> None:
    tensor = grid().to(device)
    assert tensor.add_(1) is tensor
    assert tensor.t_() is tensor


def test_a_tensor_that_grows_keeps_its_values_and_its_views(device) -> None:
    tensor = grid().to(device)
    row = tensor[1]
    tensor.resize_(100)
    tensor[5] = 70
    assert torch.equal(tensor[:5].cpu(), torch.arange(5.0))
    assert row.tolist() == [4, 70, 6, 7]


def test_a_tensor_takes_the_memory_of_another(device) -> None:
    tensor = torch.empty(0, device=device)
    other = grid().to(device)
    tensor.set_(other)
    other.add_(1)
    assert torch.equal(tensor.cpu(), grid() + 1)


OUT: dict[str, Callable[[Tensor, Tensor], object]] = {
    "masked_select": lambda x, out: torch.masked_select(x, x > 5, out=out),
    "cat": lambda x, out: torch.cat([x, x], out=out),
    "mul": lambda x, out: torch.mul(x, 2, out=out),
}


@pytest.mark.parametrize("name", OUT)
def test_a_result_goes_where_it_is_asked_to(name: str, device) -> None:
    expected = torch.empty(0)
    OUT[name](grid(), expected)
    out = torch.empty(0, device=device)
    assert OUT[name](grid().to(device), out) is out
    assert torch.equal(out.cpu(), expected)


def test_a_result_fills_a_part_of_a_buffer(device) -> None:
    buffer = torch.zeros(10, device=device)
    torch.sigmoid(torch.zeros(4, device=device), out=buffer[3:7])
    assert buffer.tolist() == [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]


def test_memory_is_freed_with_the_last_view(device) -> None:
    tensor = grid().to(device)
    memory = StorageWeakRef(tensor.untyped_storage().on_cpu)
    view = tensor.t()[1:]
    del tensor
    assert not memory.expired()
    assert view.sum() == grid()[:, 1:].sum()
    del view
    assert memory.expired()


def test_memory_of_a_graph_is_freed(device) -> None:
    layer = nn.Linear(4, 4).to(device)
    loss = layer(torch.ones(2, 4, device=device)).square().sum()
    memory = StorageWeakRef(loss.untyped_storage().on_cpu)
    loss.backward()
    layer.zero_grad()
    del loss
    gc.collect()
    assert memory.expired()


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.add_(y),
    "add to the cpu's": lambda x, y: y.add_(x),
    "stack": lambda x, y: torch.stack([x, y]),
    "cat": lambda x, y: torch.cat([y, x]),
    "product": lambda x, y: x @ y.t(),
    "linear": lambda x, y: F.linear(x, y),
    "choice": lambda x, y: torch.where(x > 1, x, y),
    "result": lambda x, y: torch.mul(x, x, out=y),
    "a number in a list": lambda x, y: torch.stack([x[0, 0], y[0, 0]]),
    "places of the cpu": lambda x, y: y[x.long() % 3],
    "gather": lambda x, y: x.gather(0, y.long() % 3),
    "equal": lambda x, y: torch.equal(x, y),
    "two cards": lambda x, y: x + y.to("pretend:1"),
    "a generator": lambda x, y: torch.rand(3, device=x.device, generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MIXED)
def test_two_devices_do_not_mix(name: str, device) -> None:
    with pytest.raises(RuntimeError, match=r"[Ee]xpected|should be either on"):
        MIXED[name](grid().to(device), grid())


ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda x, y: x * y[1, 1],
    "the smaller of two numbers": lambda x, y: torch.minimum(y[1, 1], x[1, 2]),
    "places on the cpu": lambda x, y: x[torch.tensor([0, 2])],
    "written over": lambda x, y: x.copy_(y),
    "a row written": lambda x, y: x.index_put_((torch.tensor([1]),), x[0] + 1),
    "a number filled in": lambda x, y: x.masked_fill(x > 5, y[1, 1]),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_lets_mix_may_mix(name: str, device) -> None:
    found = ALLOWED[name](grid().to(device), grid())
    assert found.device == device
    assert torch.equal(found.cpu(), ALLOWED[name](grid(), grid()))


def test_numbers_are_drawn_from_the_seed_of_the_cpu(device) -> None:
    torch.manual_seed(3)
    ours = torch.randn(5, device=device)
    torch.manual_seed(3)
    assert torch.equal(ours.cpu(), torch.randn(5))


def test_numpy_needs_the_cpu(device) -> None:
    with pytest.raises(TypeError, match="pretend"):
        grid().to(device).numpy()
    assert grid().to(device).tolist() == grid().tolist()


def test_a_copy_shares_what_the_original_shares(device) -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).to(device)
    layers[1].weight = layers[0].weight
    layers.register_buffer("table", grid().to(device))
    layers.register_buffer("row", layers.table[1])
    copied = copy.deepcopy(layers)
    assert copied[1].weight is copied[0].weight
    copied.table.zero_()
    assert torch.equal(layers.table.cpu(), grid())
    assert copied.row.tolist() == [0, 0, 0, 0]
    assert copied.row.device == device


def test_a_module_moves_there_and_back(device) -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    before = copy.deepcopy(module.state_dict())
    module.to(device)
    assert {tensor.device for tensor in module.state_dict().values()} == {device}
    module.to("cpu")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_what_safetensors_saves_is_what_was_there(device, tmp_path) -> None:
    tensors = {"table": grid(), "codes": grid().to(torch.uint8), "half": grid().bfloat16()}
    save_file({name: each.to(device) for name, each in tensors.items()}, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_the_device_is_there_only_within_its_context(device, monkeypatch) -> None:
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("pretend")
    monkeypatch.setattr(Presence, "here", False)
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0


def answer(model: nn.Module, inputs: dict, device: torch.device) -> Tensor:
    """The model's answer, after a backward pass."""
    moved = mapped(inputs, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)
    result = answer_of(model(**moved))
    result.square().sum().backward()
    return result.detach()


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_model_answers_and_learns_as_on_the_cpu(name: str, device) -> None:
    model = tiny.model(name)
    inputs = ARCHITECTURES[type(model)].example(model, 2)
    moved = copy.deepcopy(model).to(device)
    ours = answer(moved, inputs, device).cpu()
    theirs = answer(model, inputs, torch.device("cpu"))
    assert (ours - theirs).abs().max() == 0
    for one, other in zip(moved.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert other.grad is None or torch.equal(one.grad.cpu(), other.grad)
