"""The products of one denoiser call, by model: the shapes that bench/gpu/kernels.py times."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """Square images of `size` pixels a side, for one sample."""

    size: int
    channels: int
    columns: int
    kernel: int = 3
    stride: int = 1

    def rows(self, batch: int) -> int:
        return batch * (self.size // self.stride) ** 2

    @property
    def k(self) -> int:
        return self.channels * self.kernel**2

    def __str__(self) -> str:
        step = f"/{self.stride}" if self.stride > 1 else ""
        return (
            f"conv {self.kernel}x{self.kernel}{step} {self.channels} to {self.columns}"
            f" at {self.size}x{self.size}"
        )


@dataclass(frozen=True)
class Linear:
    """`tokens` of one sample."""

    tokens: int
    channels: int
    columns: int

    def rows(self, batch: int) -> int:
        return batch * self.tokens

    @property
    def k(self) -> int:
        return self.channels

    def __str__(self) -> str:
        return f"linear {self.channels} to {self.columns} of {self.tokens} tokens"


Shape = Conv | Linear

MODELS: dict[str, tuple[Shape, ...]] = {
    "ddpm-cifar10": (
        Conv(32, 128, 128),
        Conv(16, 256, 256),
        Conv(16, 512, 256),
        Conv(8, 256, 256),
        Conv(4, 256, 256),
        Conv(32, 128, 128, stride=2),
        Linear(256, 256, 256),
    ),
    "sd15": (
        Conv(64, 320, 320),
        Conv(64, 960, 320),
        Conv(32, 640, 640),
        Conv(32, 1920, 640),
        Conv(16, 1280, 1280),
        Conv(16, 2560, 1280),
        Conv(8, 1280, 1280),
        Conv(64, 320, 320, stride=2),
        Conv(64, 960, 320, kernel=1),
        Linear(4096, 320, 320),
        Linear(4096, 320, 2560),
        Linear(4096, 1280, 320),
        Linear(1024, 640, 5120),
        Linear(256, 1280, 10240),
        Linear(77, 768, 1280),
    ),
    "sdxl": (
        Conv(128, 320, 320),
        Conv(64, 640, 640),
        Conv(32, 1280, 1280),
        Conv(32, 2560, 1280),
        Linear(4096, 640, 640),
        Linear(4096, 640, 5120),
        Linear(1024, 1280, 1280),
        Linear(1024, 1280, 10240),
        Linear(1024, 5120, 1280),
        Linear(77, 2048, 1280),
    ),
    "dit-xl-2": (
        Linear(256, 1152, 1152),
        Linear(256, 1152, 4608),
        Linear(256, 4608, 1152),
        Linear(1, 1152, 6912),
    ),
    "pixart": (
        Linear(1024, 1152, 1152),
        Linear(1024, 1152, 4608),
        Linear(1024, 4608, 1152),
        Linear(120, 1152, 1152),
    ),
    "flux": (
        Linear(4096, 3072, 3072),
        Linear(4096, 3072, 12288),
        Linear(4096, 12288, 3072),
        Linear(4608, 3072, 21504),
        Linear(4608, 15360, 3072),
    ),
    # For the test on a CPU.
    "tiny": (Conv(4, 8, 12), Conv(4, 8, 12, stride=2), Linear(5, 40, 12)),
}
