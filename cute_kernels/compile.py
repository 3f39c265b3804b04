"""Compiling a CuTe kernel once per static configuration: in memory, and on disk for the processes that follow.

A compiled kernel is a TVM-FFI function. The disk cache keeps it as a shared library, which loads in about a millisecond and
without importing the DSL (importing it takes seconds). Libraries live in one folder per digest of everything that shapes the
machine code, readable by the user alone; a library appears there by an atomic rename, so readers need no lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import platformdirs

ARCH = "sm_90a"
# Read when the DSL is imported; without it, a machine that has no GPU compiles for another architecture.
os.environ.setdefault("CUTE_DSL_ARCH", ARCH)
_SYMBOL = "kernel"
Config = TypeVar("Config")


_options = ContextVar("options", default=f"--enable-tvm-ffi --gpu-arch={ARCH}")


def compile_kernel(kernel: Any, *arguments: Any) -> Any:
    """Compiles a `@cute.jit` callable for sm_90a (no GPU needed) into a TVM-FFI function that takes plain numbers."""
    import cutlass.cute as cute

    return cute.compile(kernel, *arguments, options=_options.get())


@contextlib.contextmanager
def keep_cubin(folder: str) -> Iterator[None]:
    """Within it, compile_kernel also leaves the machine code in `folder`."""
    token = _options.set(f"--enable-tvm-ffi --gpu-arch={ARCH} --keep-cubin --dump-dir={folder}")
    try:
        yield
    finally:
        _options.reset(token)


_noted: ContextVar[list[tuple[Any, tuple[Any, ...]]] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_calls() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Within it, calls of kernels are not made but noted, as (compiled function, arguments)."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    token = _noted.set(calls)
    try:
        yield calls
    finally:
        _noted.reset(token)


def notable(function: Any) -> Callable[..., None]:
    def call(*arguments: Any) -> None:
        noted = _noted.get()
        if noted is None:
            function(*arguments)
        else:
            noted.append((function, arguments))

    return call


def cached_kernel(build: Callable[[Config], Any]) -> Callable[[Config], Callable[..., None]]:
    """Caches `build(config) -> compiled kernel` in memory and on disk, keyed by the frozen config and the source digest."""
    loaded: dict[Config, Callable[..., None]] = {}

    @functools.wraps(build)
    def get(config: Config) -> Callable[..., None]:
        kernel = loaded.get(config)
        if kernel is None:
            kernel = loaded[config] = notable(_from_disk_or_build(build, config))
        return kernel

    return get


def _from_disk_or_build(build: Callable[[Config], Any], config: Config) -> Any:
    name = hashlib.sha256(f"{build.__module__}.{build.__qualname__}({config!r})".encode()).hexdigest()[:32]
    library = cache_folder() / f"{name}.so"
    kernel = _from_disk(library)
    if kernel is not None:
        return kernel
    linker = shutil.which("cc") or shutil.which("gcc")
    if (
        linker is None
    ):  # the object file alone would need the DSL's own loader: then there is nothing to gain from a cache
        return build(config)
    from filelock import FileLock  # 10 ms of import that a library from the disk does not need

    # Of many processes that start together, one compiles, and the others load what it made.
    with FileLock(library.with_suffix(".lock")):
        return _from_disk(library) or _build_and_keep(build, config, library, linker)


def _from_disk(library: Path) -> Any | None:
    """None where there is none, and where it is damaged: it is made anew then."""
    if library.exists():
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            return _load(library)
    return None


def _build_and_keep(build: Callable[[Config], Any], config: Config, library: Path, linker: str) -> Any:
    compiled = build(config)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        object_file, linked = Path(scratch, "kernel.o"), Path(scratch, "kernel.so")
        compiled.export_to_c(object_file_path=str(object_file), function_name=_SYMBOL)
        subprocess.run([linker, "-shared", "-o", str(linked), str(object_file)], check=True)
        os.replace(linked, library)
    return _load(library)


def _load(library: Path) -> Any:
    import tvm_ffi

    _load_dsl_runtime()
    return tvm_ffi.load_module(str(library)).get_function(_SYMBOL)


@functools.cache
def _load_dsl_runtime() -> None:
    """Makes the symbols of the DSL's runtime library visible to the cached libraries, which are linked without it."""
    package = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = list(package.submodule_search_locations or []) if package else []
    found = [path for root in roots for path in sorted(Path(root).glob("*/lib/libcute_dsl_runtime.so"))]
    if not found:
        raise OSError("libcute_dsl_runtime.so is not part of the installed nvidia-cutlass-dsl")
    ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def source_digest() -> str:
    """SHA-256 over the kernel sources, the compiler versions and the target: what a compiled kernel depends on."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("nvidia-cutlass-dsl", "apache-tvm-ffi"):
        digest.update(f"{package}=={importlib.metadata.version(package)}\0".encode())
    digest.update(f"{ARCH} {sys.platform} {os.uname().machine}".encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """`$ATTNRES_CACHE_DIR` or the user's cache folder, with mode 0700; one folder below it per source digest."""
    root = Path(os.environ.get("ATTNRES_CACHE_DIR") or platformdirs.user_cache_dir("attnres"))
    folder = root / source_digest()[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    return folder
