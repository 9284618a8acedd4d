"""The build of the native kernels; everything else of the package is in pyproject.toml.

The extension is optional: without a C++ compiler lowtide installs without it and says so where it
matters. It is a plain shared library that lowtide/kernels/native_library.py loads by ctypes, so one
build serves every version of Python and torch.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("lowtide/kernels/native")
SOURCES = sorted(NATIVE.glob("*.cpp"))
FLAGS = [
    "-std=c++17",
    "-O3",
    # Python's own flags ask for debug information, four times the size of the code.
    "-g0",
    "-pthread",
    # The same sums on every instruction set: no product and sum become one by themselves.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    # Vectors of 64 bytes are passed between functions of one file only.
    "-Wno-psabi",
    # gcc takes the undefined operands of its own AVX512 intrinsics for mistakes.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]

setup(
    ext_modules=[
        Extension(
            "lowtide.kernels._native",
            sources=[str(path) for path in SOURCES],
            depends=[str(path) for path in (*NATIVE.glob("*.h"), *NATIVE.glob("*.inc"))],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
