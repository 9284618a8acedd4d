"""World: the processes of a run, what they share out, and what they tell each other.

Rank r of R processes takes the r-th of R equal parts of a list, so that the parts, one after the
other, are the list of one process. On one process every method does nothing, and torch starts no
process group. All ranks call the same methods in the same order.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lowtide.distributed.launch import launched
from lowtide.errors import BadInput

Item = TypeVar("Item")
# How long a rank waits for another one that works alone, such as the first while it measures. One
# that has ended is noticed at once.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among those of the run.

    store: where the ranks leave notes for each other.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def bounds(self, count: int) -> tuple[int, int]:
        """The start and the end of this rank's part of `count` items.

        Parts differ by one item at most, and the first ranks have the larger ones.
        """
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return start, start + each + (self.rank < more)

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of the items."""
        start, end = self.bounds(len(items))
        return items[start:end]

    def gathered(self, own: Sequence[Item]) -> list[Item]:
        """The items of all ranks, in the order of the ranks; tensors in them lie on the CPU."""
        if self.size == 1:
            return list(own)
        parts: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(parts, list(own), group=self.group)
        items: list[Item] = []
        for part in parts:
            items += part
        return items

    def total(self, value: float) -> float:
        """The sum over the ranks: the same number on each, because all add in one order."""
        return sum(self.gathered([value]))

    def sum_gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Replace each gradient by its sum over the ranks; the sum of the losses.

        A rank without samples has no gradients and adds zeros.
        """
        if self.size == 1:
            return loss
        gradients: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        device = gradients[0].device
        flat = torch.cat(
            [loss.detach().to(device).reshape(1), *(each.reshape(-1) for each in gradients)]
        )
        total, *sums = self._reduced(flat, dist.ReduceOp.SUM).split(
            [1, *(each.numel() for each in gradients)]
        )
        for gradient, each in zip(gradients, sums, strict=True):
            gradient.copy_(each.view(gradient.shape))
        return total[0]

    def extremes(self, lows: Sequence[Tensor], highs: Sequence[Tensor]) -> None:
        """Replace the minima and the maxima by those over all ranks, in place."""
        if self.size == 1 or not lows:
            return
        flat = torch.cat([*(each.reshape(-1) for each in lows), *(-each for each in highs)])
        parts = self._reduced(flat, dist.ReduceOp.MIN).split(
            [each.numel() for each in (*lows, *highs)]
        )
        for low, part in zip(lows, parts[: len(lows)], strict=True):
            low.copy_(part.view(low.shape))
        for high, part in zip(highs, parts[len(lows) :], strict=True):
            high.copy_(-part.view(high.shape))

    def of_first(self, function: Callable[[], Item]) -> Item:
        """What the function answers on the first rank, or its BadInput; the others wait for it."""
        if self.size == 1:
            return function()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = function()
            except BadInput as error:
                told[1] = (error.found, error.expected, error.way_out)
        with self._together():
            dist.broadcast_object_list(told, src=0, group=self.group)
        answer, wrong = told
        if wrong:
            raise BadInput(*wrong)
        return answer

    @contextmanager
    def inside(self, context: AbstractContextManager[Item]) -> Iterator[Item | None]:
        """The first rank is inside the context; the others wait until it is in, and until it left.

        They get None.
        """
        entered: list[Item] = []
        with ExitStack() as stack:
            self.of_first(lambda: entered.append(stack.enter_context(context)))
            yield entered[0] if self.first else None
            self.of_first(stack.close)

    def check_alike(self, what: str) -> None:
        """Raise if the ranks were called for different work, which is told by this text."""
        if len(set(self.gathered([what]))) > 1:
            raise BadInput(
                "found processes that were asked for different work",
                "the same model, method, settings and version of lowtide in all",
                "call lowtide alike in each process of torchrun",
            )

    def _reduced(self, flat: Tensor, operation: Any) -> Tensor:
        """The tensor reduced over all ranks, on the CPU where its device has no backend."""
        place = flat if flat.device.type in ("cpu", "cuda") else flat.cpu()
        with self._together():
            dist.all_reduce(place, operation, group=self.group)
        return place.to(flat.device)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within the context, an error of torch.distributed means that a rank is gone."""
        try:
            yield
        except RuntimeError as error:
            raise lost(self.size) from error


def lost(size: int) -> BadInput:
    """The error of a rank that lives while another one does not."""
    return BadInput(
        "found that another process of this run has ended",
        f"all {size} to work until the end",
        "see what that process said; the same command goes on after the last finished block",
    )


@cache
def join() -> World:
    """This process among those that torchrun started; alone without torchrun."""
    launch = launched()
    if not launch.several:
        return World()
    cards = torch.cuda.device_count()
    if launch.local_rank < cards:
        torch.cuda.set_device(launch.local_rank)
    backend = "cpu:gloo,cuda:nccl" if cards else "gloo"
    if dist.is_initialized():  # by the program that calls lowtide
        group = dist.new_group(timeout=PATIENCE, backend=backend)
        assert isinstance(group, dist.ProcessGroup)  # of all ranks
        return World(dist.get_rank(), dist.get_world_size(), group)
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise BadInput(
            f"found that the {launch.size} processes did not meet",
            "all of them at MASTER_ADDR and MASTER_PORT",
            "start them with torchrun, with one --rdzv-endpoint for several machines",
        ) from error
    return World(rank, size, dist.group.WORLD, PrefixStore("lowtide", store))


def leave() -> None:
    """End the process group that `join` began, after all work."""
    if join.cache_info().currsize and join().store is not None:
        dist.destroy_process_group()


def says(text: str) -> bool:
    """Whether this rank is the one to say this sentence: of all that would, the first to ask."""
    if not join.cache_info().currsize:
        return launched().first
    store = join().store
    try:
        return store is None or store.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except RuntimeError:
        return True  # The store is gone with the process that held it.
