"""Compiles the C++ kernels at first use, into a cache folder of the user.

The library is plain C behind ctypes: it needs a C++ compiler, but neither PyTorch's headers
nor a build system, and compiles in a few seconds.  Its name in the cache holds a hash of all
that its code depends on, so an upgrade or another machine on a shared home never meets a
stale one.  ``python -m penstock.engine.kernels.build`` compiles ahead of time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = ("paged.cpp", "layers.cpp", "matrix.cpp", "decoder.cpp")
HEADERS = ("lanes.h", "paged_tiles.h", "penstock.h", "tiles.h", "work.h")


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def library() -> Path:
    """Path of the compiled kernels, compiling them first where needed.

    Raises:
        BuildError: no compiler, the compiler failed, or there is no cache or no way to write it.
    """
    compiler = find_compiler()
    path = cache_folder() / f"kernels-{fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            compile_library(compiler, fresh)
            # Atomic, so that processes starting at once each find a whole file.
            fresh.replace(path)
    except OSError as error:
        msg = f"cannot write the kernel cache {path.parent}: {error}"
        raise BuildError(msg) from error
    return path


def find_compiler() -> str:
    """The C++ compiler: ``$CXX`` if set, else the first of c++, g++, clang++ on the path.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    msg = f"no C++ compiler: {wanted or 'c++, g++ or clang++'} is not on the PATH"
    raise BuildError(msg)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/penstock``, by default ``~/.cache/penstock``.

    Raises:
        BuildError: neither that nor a home folder is known.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path("~/.cache").expanduser()) / "penstock"
    except RuntimeError as error:
        msg = f"no folder for the compiled kernels: {error}; set HOME or XDG_CACHE_HOME"
        raise BuildError(msg) from error


def fingerprint(compiler: str) -> str:
    """Hash of what decides the compiled code: sources, compiler, flags, CPU, PyTorch."""
    here = Path(__file__).parent
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    parts = [version, *flags(), *_openmp(), platform.machine(), _cpu_flags(), torch.__version__]
    parts += [(here / name).read_text() for name in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def flags() -> list[str]:
    """Compiler flags."""
    common = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fPIC"]
    return [*common, "-fopenmp"] if _openmp() else common


def _openmp() -> list[str]:
    """What to link for OpenMP; empty: the kernels run on one thread.

    Two OpenMP runtimes in one process keep two pools of spinning threads, and on few cores
    that costs more than the kernels gain.  So the library binds to the runtime that PyTorch
    brings along and has loaded.
    """
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return []
    home = Path(torch.__file__).parent
    bundled = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    return [str(min(bundled))] if bundled else ["-fopenmp"]


def _cpu_flags() -> str:
    """What ``-march=native`` sees of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keep = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keep)}))


def compile_library(compiler: str, target: Path) -> None:
    """Compile the sources into ``target``.

    Raises:
        BuildError: with the end of the compiler's output.
    """
    here = Path(__file__).parent
    objects = [target.with_name(f"{name}.o") for name in SOURCES]
    for name, compiled in zip(SOURCES, objects, strict=True):
        _run([compiler, *flags(), "-c", str(here / name), "-o", str(compiled)])
    _run([compiler, "-shared", *map(str, objects), *_openmp(), "-o", str(target)])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        msg = f"{command[0]} failed on the kernels: {result.stderr.strip()[-2000:]}"
        raise BuildError(msg)


def main() -> int:
    """Build and say where; 1 with the reason when that fails."""
    try:
        sys.stdout.write(f"{library()}\n")
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
