"""The native library: where it is, whether it fits, and its structures as ctypes.

The structures mirror kernels/native/lowtide.h field by field. `library()` compares their sizes with
those of the library, so a library that was built from other sources is refused.
"""

import ctypes
import struct
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ABI = 9
GEMM, GROUP_MOMENTS, STREAM, LAYER_NORM, ATTENTION, ROW, ARRANGE, HASH, CHECKSUM = range(9)
IDENTITY, SILU, GELU_TANH, GELU_ERF = range(4)
# What a run returns: bits of kernels/native/lowtide.h.
NOT_A_NUMBER = 1
BAD_CALL = 2
NO_MEMORY = 4
SETS = {"portable": 1, "avx2": 2, "avxvnni": 4, "avx512vnni": 8}
SINKS = 4

_Pair = c_void_p * 2
_LongPair = c_int64 * 2


class Sink(ctypes.Structure):
    """Where a kernel stores its result: float32, or codes of the layer that reads them next."""

    _fields_ = [
        ("y", c_void_p),
        ("sample", c_int64),
        ("row", c_int64),
        ("column", c_int64),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("smooth", c_void_p),
        ("inverse", c_void_p),
        ("top", c_float),
        ("upsample", c_int32),
        ("above", c_int32),
        ("left", c_int32),
        ("below", c_int32),
        ("right", c_int32),
        ("channels", c_int32),
    ]


class Weight(ctypes.Structure):
    """The weight of a layer in panels of 64 columns."""

    _fields_ = [
        ("data", c_void_p),
        ("panel", c_void_p),
        ("masks", c_void_p),
        ("shifts", c_void_p),
        ("zeros", c_void_p),
        ("scale", c_void_p),
        ("sums", c_void_p),
        ("factors", c_void_p),
        ("groups", c_void_p),
        ("columns", c_int64),
        ("k4", c_int64),
        ("group_count", c_int64),
        ("planes", c_int32),
        ("uniform", c_int32),
    ]


class Gemm(ctypes.Structure):
    """A linear layer or a convolution, with its epilogue."""

    _fields_ = [
        ("x", c_void_p),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("x_sample", c_int64),
        ("x_row", c_int64),
        ("x_column", c_int64),
        ("taps", c_void_p),
        ("tap_count", c_int64),
        ("tap_k4", c_int64),
        ("x_scale", c_void_p),
        ("x_zero", c_void_p),
        ("weight", Weight),
        ("bias", c_void_p),
        ("per_sample", c_void_p),
        ("per_sample_stride", c_int64),
        ("gate", c_void_p),
        ("gate_stride", c_int64),
        ("residual", c_void_p),
        ("r_sample", c_int64),
        ("r_row", c_int64),
        ("r_column", c_int64),
        ("factor", c_float),
        ("activation", c_int32),
        ("gated", c_int32),
        ("unused", c_int32),
        ("sink", Sink),
    ]


class GroupMoments(ctypes.Structure):
    """Mean and deviation of groups of channels, as a gain and an offset of each channel."""

    _fields_ = [
        ("x", _Pair),
        ("channels", _LongPair),
        ("x_sample", _LongPair),
        ("x_pixel", _LongPair),
        ("batch", c_int64),
        ("pixels", c_int64),
        ("groups", c_int64),
        ("epsilon", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("gain", c_void_p),
        ("offset", c_void_p),
        ("partial", c_void_p),
        ("blocks", c_int64),
    ]


class Stream(ctypes.Structure):
    """activation(x * gain + offset) * times, stored by up to four sinks."""

    _fields_ = [
        ("x", _Pair),
        ("channels", _LongPair),
        ("x_sample", _LongPair),
        ("x_row", _LongPair),
        ("x_column", _LongPair),
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("gain", c_void_p),
        ("offset", c_void_p),
        ("times", c_void_p),
        ("t_sample", c_int64),
        ("t_row", c_int64),
        ("t_column", c_int64),
        ("activation", c_int32),
        ("sinks", c_int32),
        ("sink", Sink * SINKS),
    ]


class LayerNorm(ctypes.Structure):
    """Each row normalized and modulated, stored by up to four sinks."""

    _fields_ = [
        ("x", c_void_p),
        ("batch", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("x_sample", c_int64),
        ("x_row", c_int64),
        ("epsilon", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("gain", c_void_p),
        ("gain_stride", c_int64),
        ("shift", c_void_p),
        ("shift_stride", c_int64),
        ("sinks", c_int32),
        ("unused", c_int32),
        ("sink", Sink * SINKS),
    ]


class Operand(ctypes.Structure):
    """A rounded operand of attention."""

    _fields_ = [
        ("x", c_void_p),
        ("sample", c_int64),
        ("head", c_int64),
        ("token", c_int64),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("top", c_float),
        ("is_codes", c_int32),
    ]


class Attention(ctypes.Structure):
    """softmax(q k' * factor + bias) v, with q, k, v and the softmax output rounded."""

    _fields_ = [
        ("q", Operand),
        ("k", Operand),
        ("v", Operand),
        ("p_scale", c_void_p),
        ("p_zero", c_void_p),
        ("p_top", c_float),
        ("adaptive", c_int32),
        ("factor", c_float),
        ("y_top", c_float),
        ("bias", c_void_p),
        ("bias_sample", c_int64),
        ("bias_head", c_int64),
        ("batch", c_int64),
        ("heads", c_int64),
        ("queries", c_int64),
        ("keys", c_int64),
        ("width", c_int64),
        ("y", c_void_p),
        ("y_sample", c_int64),
        ("y_head", c_int64),
        ("y_token", c_int64),
        ("y_scale", c_void_p),
        ("y_zero", c_void_p),
        ("scratch", c_void_p),
    ]


class Row(ctypes.Structure):
    """The features of the running step, from a table."""

    _fields_ = [
        ("table", c_void_p),
        ("step", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("copies", c_int64),
    ]


class Arrange(ctypes.Structure):
    """A weight between the order of a checkpoint and panels, in one direction or the other."""

    _fields_ = [
        ("packed", c_void_p),
        ("row_start", c_void_p),
        ("bits", c_void_p),
        ("zero", c_void_p),
        ("doubled", c_void_p),
        ("factor", c_void_p),
        ("group", c_int64),
        ("rows", c_int64),
        ("channels", c_int64),
        ("taps", c_int64),
        ("data", c_void_p),
        ("panel", c_void_p),
        ("masks", c_void_p),
        ("sums", c_void_p),
        ("planes", c_int32),
        ("backwards", c_int32),
    ]


class Hash(ctypes.Structure):
    """BLAKE2b of many messages."""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_void_p),
        ("hashes", c_void_p),
        ("count", c_int64),
        ("size", c_int64),
    ]


class Checksum(ctypes.Structure):
    """The arguments of the kernel that takes a checksum of each message."""

    _fields_ = [
        ("data", c_void_p),
        ("bytes", c_void_p),
        ("sums", c_void_p),
        ("count", c_int64),
    ]


class Call(ctypes.Structure):
    """A kernel and the address of its arguments."""

    _fields_ = [("kernel", c_int32), ("unused", c_int32), ("arguments", c_void_p)]


KERNELS: dict[type[ctypes.Structure], int] = {
    Gemm: GEMM,
    GroupMoments: GROUP_MOMENTS,
    Stream: STREAM,
    LayerNorm: LAYER_NORM,
    Attention: ATTENTION,
    Row: ROW,
    Arrange: ARRANGE,
    Hash: HASH,
    Checksum: CHECKSUM,
}


@dataclass(frozen=True)
class Native:
    """The loaded library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""

    def instruction_sets(self) -> list[str]:
        """What this machine has of what the kernels know, the best first."""
        if self.library is None:
            return []
        found = self.library.lowtide_instruction_sets()
        return [name for name, bit in reversed(SETS.items()) if found & bit]

    def run(self, calls: ctypes.Array[Call], threads: int, set: int = 0) -> int:
        """Run all calls; returns the bits of what went wrong, 0 if nothing."""
        assert self.library is not None, self.reason
        return self.library.lowtide_run(calls, len(calls), threads, set)

    def run_one(self, arguments: ctypes.Structure, threads: int) -> None:
        """Run one kernel that rounds nothing."""
        kernel = KERNELS[type(arguments)]
        outcome = self.run((Call * 1)(Call(kernel, 0, ctypes.addressof(arguments))), threads)
        if outcome & NO_MEMORY:
            raise MemoryError("The native kernels found no memory for their scratch space.")
        assert not outcome, "a native kernel of another version was called"

    def attention_scratch(self, attention: Attention) -> int:
        """Bytes of scratch memory that these arguments need."""
        assert self.library is not None, self.reason
        return self.library.lowtide_attention_scratch(ctypes.byref(attention))


@cache
def native() -> Native:
    """The native library beside this file, if it was built and fits."""
    folder = Path(__file__).parent
    paths = [folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    built = [path for path in paths if path.exists()]
    if not built:
        return Native(None, "lowtide was installed without a C++ compiler")
    return load(built[0])


def load(path: Path) -> Native:
    """The library at this path, or why it cannot be used."""
    try:
        if _is_truncated(path):
            return Native(None, f"{path.name} cannot be loaded (the file is truncated); reinstall")
        library = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        return Native(None, f"{path.name} cannot be loaded ({error})")
    mismatch = _mismatch(library)
    if mismatch:
        return Native(None, f"{path.name} was built from other sources ({mismatch}); reinstall")
    library.lowtide_run.argtypes = [c_void_p, c_int64, c_int32, c_int32]
    library.lowtide_attention_scratch.argtypes = [c_void_p]
    library.lowtide_attention_scratch.restype = c_int64
    return Native(library)


def _is_truncated(path: Path) -> bool:
    """Whether an ELF file ends before its last table does; loading it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False
    [start] = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < start + size * count


def _mismatch(library: ctypes.CDLL) -> str:
    """What differs between the library and this file; empty if nothing does."""
    if not hasattr(library, "lowtide_abi") or library.lowtide_abi() != ABI:
        return "another version of the interface"
    library.lowtide_sizeof.restype = c_int64
    for which, structure in enumerate([*KERNELS, Sink, Weight, Operand]):
        expected = ctypes.sizeof(structure)
        found = library.lowtide_sizeof(which)
        if found != expected:
            return f"{structure.__name__} has {found} bytes, not {expected}"
    return ""
