"""What torch asks of the pretend accelerator: its module, its hooks, and whether it is there."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAME = "pretend"
COUNT = 2


class Presence:
    """Whether this machine has the accelerator now; torch knows its name at all times."""

    here = False


class Held:
    """Bytes on the device: now, the most since `reset`, and how many it has; beyond them, an error.

    Without a limit, the device is endless.
    """

    now = 0
    most = 0
    limit: int | None = None

    @classmethod
    def count(cls, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        size = storage.nbytes()
        if cls.limit is not None and cls.now + size > cls.limit:
            raise torch.OutOfMemoryError(f"pretend out of memory: {size} bytes asked for")
        cls.now += size
        cls.most = max(cls.most, cls.now)
        weakref.finalize(storage, cls._free, size)

    @classmethod
    def _free(cls, size: int) -> None:
        cls.now -= size

    @classmethod
    def reset(cls) -> None:
        """Count from here on."""
        cls.most = cls.now


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
    def mem_get_info(device: object = None) -> tuple[int, int]:
        """Bytes that are free, and all of them; a device without a limit has a million GiB."""
        total = Held.limit or 1 << 50
        return total - Held.now, total

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
