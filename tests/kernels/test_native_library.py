"""Loading the native library, calls that it refuses, and threads and processes that share it."""

import _ctypes
import ctypes
import gc
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from native_programs import Machine, Memory, Steps, code_sink, float_sink, generator, program, sinks

from lowtide.kernels import native_library
from lowtide.kernels.native_library import (
    BAD_CALL,
    SETS,
    Attention,
    Call,
    Gemm,
    GroupMoments,
    LayerNorm,
    Native,
    Row,
    Stream,
)


@pytest.fixture
def path(native: Native) -> Path:
    assert native.library is not None
    return Path(native.library._name)


def test_library_of_another_interface_is_refused(path, monkeypatch):
    monkeypatch.setattr(native_library, "ABI", native_library.ABI + 1)
    loaded = native_library.load(path)
    assert loaded.library is None
    assert "was built from other sources (another version of the interface)" in loaded.reason


def test_structures_of_another_size_are_refused(path, monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*Row._fields_, ("more", ctypes.c_int64)]

    kinds = [Longer if kind is Row else kind for kind in native_library.KERNELS]
    changed = {kind: kernel for kernel, kind in enumerate(kinds)}
    monkeypatch.setattr(native_library, "KERNELS", changed)
    loaded = native_library.load(path)
    assert loaded.library is None
    assert "Longer has 40 bytes, not 48" in loaded.reason


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated_library_is_refused(path, tmp_path, share):
    whole = path.read_bytes()
    part = tmp_path / "_native.so"
    part.write_bytes(whole[: int(len(whole) * share)])
    loaded = native_library.load(part)
    assert loaded.library is None
    assert "_native.so cannot be loaded" in loaded.reason


def test_foreign_files_are_refused(tmp_path):
    text = tmp_path / "_native.so"
    text.write_text("not a library\n" * 1000)
    for path in (text, tmp_path, tmp_path / "missing.so"):
        loaded = native_library.load(path)
        assert loaded.library is None
        assert f"{path.name} cannot be loaded" in loaded.reason


def test_foreign_library_is_refused():
    loaded = native_library.load(Path(_ctypes.__file__))
    assert loaded.library is None
    assert "another version of the interface" in loaded.reason


def test_missing_library_has_a_reason(monkeypatch):
    monkeypatch.setattr(native_library, "EXTENSION_SUFFIXES", [".none"])
    loaded = native_library.native.__wrapped__()
    assert loaded.library is None
    assert loaded.instruction_sets() == []
    assert loaded.reason == "lowtide was installed without a C++ compiler"


def copying(at: Memory, x: torch.Tensor, y: torch.Tensor, rows: int = 1) -> Row:
    return Row(table=at(x), step=at(torch.tensor(0)), y=at(y), width=len(x), copies=rows)


@pytest.mark.parametrize("kernel", [-1, len(native_library.KERNELS), 1000])
def test_unknown_kernel_is_refused(machine, kernel):
    at = Memory()
    y = torch.zeros(4)
    row = copying(at, torch.ones(4), y)
    calls = (Call * 1)(Call(kernel=kernel, arguments=ctypes.addressof(row)))
    assert machine.native.run(calls, machine.threads, machine.set) == BAD_CALL
    assert not y.any()


def test_call_without_arguments_is_refused(machine):
    calls = (Call * 1)(Call(kernel=native_library.ROW))
    assert machine.native.run(calls, machine.threads, machine.set) == BAD_CALL


def test_set_that_the_machine_lacks_is_refused(native):
    at = Memory()
    y = torch.zeros(4)
    calls = program(copying(at, torch.ones(4), y))
    missing = [bit for name, bit in SETS.items() if name not in native.instruction_sets()]
    for bits in (*missing, 3, 16, 1 << 30, -1):
        assert native.run(calls, 1, bits) == BAD_CALL
    assert not y.any()
    assert native.run(calls, 1) == 0
    assert y.all()


def test_program_without_calls_does_nothing(machine):
    assert machine.run() == 0


@pytest.mark.parametrize("kind", [Gemm, GroupMoments, Stream, LayerNorm, Attention])
def test_empty_inputs_do_nothing(machine, kind):
    """All sizes are zero, and so are all addresses but those of the grids."""
    at = Memory()
    one = at.number(1.0)
    empty = kind()
    for name in ("x_scale", "x_zero", "p_scale", "p_zero"):
        if hasattr(empty, name):
            setattr(empty, name, one)
    assert machine.run(empty) == 0


def test_batch_of_zero_does_nothing(machine):
    at = Memory()
    y = torch.full((1, 1, 8, 8), 7.0)
    x = torch.zeros(1, 8, 8)
    norm = LayerNorm(x=at(x), batch=0, rows=8, channels=8, **sinks(float_sink(at, y)))
    assert machine.run(norm) == 0
    assert y.unique().tolist() == [7.0]


def rounding(seed: int) -> tuple[Memory, Stream, torch.Tensor, torch.Tensor]:
    """A stream over 40 rows: what keeps it alive, the stream, its result and what that must be."""
    at = Memory()
    x = torch.randn(1, 40, 16, 24, generator=generator(seed))
    codes = torch.zeros(1, 40, 16, 24, dtype=torch.uint8)
    steps = Steps(0.02 + seed / 1000, 128)
    first, row, column, _ = x.stride()
    structure = Stream(
        x=(ctypes.c_void_p * 2)(at(x)),
        channels=(ctypes.c_int64 * 2)(24),
        x_sample=(ctypes.c_int64 * 2)(first),
        x_row=(ctypes.c_int64 * 2)(row),
        x_column=(ctypes.c_int64 * 2)(column),
        batch=1,
        height=40,
        width=16,
        **sinks(code_sink(at, codes, steps)),
    )
    return at, structure, codes, steps.codes(x)


def run_often(native: Native, seed: int, threads: int, times: int = 100) -> bool:
    """Whether each run gives the right codes."""
    at, structure, codes, expected = rounding(seed)
    calls = program(*[structure] * 5)
    for _ in range(times):
        codes.zero_()
        if native.run(calls, threads) != 0 or not torch.equal(codes.float(), expected):
            return False
    return len(at.tensors) > 0


def test_programs_of_several_python_threads(native):
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run_often, native, seed, 2) for seed in range(6)]
        assert all(run.result() for run in runs)


def test_number_of_threads_may_change(native):
    for threads in (1, 3, 2, 1, 4, 0, -5, 2):
        assert run_often(native, threads, threads, times=5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_child_process_after_fork(native, threads):
    assert run_often(native, 1, threads, times=5)
    gc.collect()
    child = os.fork()
    if child == 0:
        # A change of the number ends the threads of before, which do not exist in the child.
        signal.alarm(60)
        right = all(run_often(native, 2, number, times=20) for number in (threads, 3, threads))
        os._exit(0 if right else 1)
    assert run_often(native, 4, threads, times=20)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_machine_has_the_portable_set(native):
    assert native.instruction_sets()[-1] == "portable"
    assert set(native.instruction_sets()) <= set(SETS)
    assert str(Machine(native, 1, 2)) == "portable-2"
    assert sys.maxsize > 2**32
