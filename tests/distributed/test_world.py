"""The processes of torchrun: their parts, their cards, and one process that starts no group."""

from dataclasses import asdict
from itertools import chain

import pytest
import torch

import lowtide
from lowtide import cli
from lowtide.distributed.launch import NAMES, Launch, launched
from lowtide.distributed.world import World, join
from lowtide.errors import BadInput
from lowtide.machine import devices
from lowtide.methods import recipe_of
from lowtide.nn.quantizer import QDrop, SamplePart
from lowtide.settings import Settings
from lowtide.stages.base import recipe_digest


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torchrun in the second process of a machine."""
    for name, value in zip(NAMES, ("3", "1", "4", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: card)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 16])
def test_the_parts_make_the_whole(size: int, count: int) -> None:
    items = list(range(count))
    parts = [World(rank, size).part(items) for rank in range(size)]
    assert list(chain.from_iterable(parts)) == items
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_alone_nothing_happens() -> None:
    world = World()
    loss = torch.ones(())
    assert world.part("abc") == "abc"
    assert world.gathered([1, 2]) == [1, 2]
    assert world.total(0.1) == 0.1
    assert world.sum_gradients(loss, []) is loss
    assert world.of_first(lambda: 3) == 3
    world.check_alike("anything")


def test_one_process_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **options: started.append(args))
    join.cache_clear()
    lowtide.quantize("zoo:digits", method="minmax", steps=1, images=1, device="cpu")
    assert join() == World()
    assert started == []
    assert not torch.distributed.is_initialized()


def test_one_process_of_torchrun_is_alone(second_of_two, monkeypatch) -> None:
    assert asdict(launched()) == {"rank": 3, "local_rank": 1, "size": 4}
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == Launch()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_the_card_of_its_number(name: str, second_of_two, two_cards) -> None:
    assert devices.chosen(name) == torch.device("cuda", 1)
    assert devices.chosen("cpu") == devices.CPU


def test_a_number_of_a_card_is_refused(second_of_two, two_cards) -> None:
    with pytest.raises(BadInput, match=r"found device 'cuda:0' under torchrun; .*; give --device"):
        devices.chosen("cuda:0")


def test_more_processes_than_cards_are_refused(second_of_two, two_cards, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(BadInput, match=r"found process 2 on .* 2 of cuda; .* --nproc-per-node 2"):
        devices.chosen("auto")


def test_a_model_on_the_card_of_another_process_is_refused(second_of_two, two_cards) -> None:
    devices.check_own_card(torch.device("cuda", 1))
    devices.check_own_card(devices.CPU)
    with pytest.raises(BadInput, match=r"found a model on cuda:0 in process 1 .* on cuda:1"):
        devices.check_own_card(torch.device("cuda", 0))


@pytest.mark.parametrize("command", ["demo", "reschedule x --out y --steps 3", "bench speed x"])
def test_commands_that_share_nothing_are_refused(command, second_of_two, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("sys.argv", ["lowtide", *command.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capfd.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"error: found lowtide {command.split()[0]} under torchrun; expected ")
    assert len(said.splitlines()) == 1


def test_records_are_those_of_all_samples_of_a_batch() -> None:
    """Two processes with 8 go on where one with 16 stopped, and not where one with 8 did."""

    def digest(batch: int, ranks: int) -> str:
        settings = Settings(batch=batch)
        return recipe_digest(recipe_of("tfmq", settings), settings, "abc", ranks)

    assert digest(8, 2) == digest(16, 1) == digest(4, 4)
    assert digest(8, 2) != digest(8, 1)


def test_chances_of_a_sample_do_not_depend_on_its_process() -> None:
    """Also where the first axis holds three heads of each sample, and where it holds none."""
    x = torch.zeros(15, 4)

    def masks(part: SamplePart, rows: slice) -> torch.Tensor:
        drop = QDrop(0.5, torch.Generator().manual_seed(0))
        drop.part = part
        first = drop(x[rows], torch.ones_like(x[rows]))
        assert drop(torch.zeros(1, 2), torch.ones(1, 2)).shape == (1, 2)
        return torch.cat([first, drop(x[rows], torch.ones_like(x[rows]))], 1)

    whole = masks(SamplePart(0, 5, 5), slice(0, 15))
    halves = [masks(SamplePart(0, 3, 5), slice(0, 9)), masks(SamplePart(3, 5, 5), slice(9, 15))]
    assert 0.2 < float(whole.mean()) < 0.8
    assert torch.equal(torch.cat(halves), whole)


def test_join_is_made_once() -> None:
    assert join() is join()
