"""What torch asks of the pretend accelerator: its module, its hooks, and whether it is there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAME = "pretend"
COUNT = 2


class Presence:
    """Whether this machine has the accelerator now; torch knows its name at all times."""

    here = False


class Module:
    """What torch asks of a device's own module, `torch.pretend`."""

    @staticmethod
    def is_available() -> bool:
        return Presence.here

    @staticmethod
    def device_count() -> int:
        return COUNT if Presence.here else 0

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Numbers are drawn on the CPU, whose seed torch sets beside this one."""

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Every operator has finished when it returns."""

    @staticmethod
    def empty_cache() -> None:
        """Memory is freed with its tensors."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a kind of accelerator; there is none outside `present`."""

    def is_available(self) -> bool:
        return Presence.here

    def has_primary_context(self, device: int) -> bool:
        return Presence.here

    def is_built(self) -> bool:
        return True


class Guard(torch._C._acc.DeviceGuard):
    """Operators find their device by their tensors, so no current device has to be kept."""

    def type_(self) -> object:
        return torch._C._autograd.DeviceType.PrivateUse1


@contextmanager
def present() -> Iterator[torch.device]:
    """Within the context, this machine has two cards of the kind `pretend`."""
    before = Presence.here
    Presence.here = True
    try:
        yield torch.device(NAME, 0)
    finally:
        Presence.here = before
