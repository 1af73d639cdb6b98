"""Kernels as machine code: compiled by LLVM, kept in a folder, loaded, and known to XLA.

Compiling a kernel takes a part of a second. What comes out is an object file without an address of the process that
made it, which a later process loads in a few hundredths of a second. LLVM comes with llvmlite, which is imported where
kernels are wanted, and nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import logging
import platform
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import kept_files
from pallas_kernels.cpu_ffi import call_frame, work_sharing

logger = logging.getLogger("pallas_kernels")

#: processor features without which kernels would be slow, or could not widen float16
NEEDED = {"x86_64": ("avx2", "fma", "f16c"), "aarch64": ("neon",)}

#: reasons that the log has
_told: set[str] = set()


class Unavailable(Exception):
    """Why there are no kernels."""


class Kernels:
    """The kernels of a process.

    Args:
        module: the llvmlite module of a kernel, by its name; it has a function `kernel` (`work_sharing`).
        sources: Python files, or folders of them, that a kernel's code follows from, besides this one's folder.
    """

    def __init__(self, module: Callable[[str], Any], sources: Iterable[Path]):
        self._module, self.sources = module, (Path(__file__).parent, *sources)
        self._lock = threading.Lock()
        #: those that XLA knows
        self._names: set[str] = set()
        #: what keeps their machine code alive
        self._engines: list[Any] = []
        self._compiler: _Compiler | None = None
        self._reason: str | None = None

    def load(self, names: Iterable[str], folder: Path | None) -> str:
        """Make kernels known to XLA, for good.

        Args:
            folder: where their machine code is kept; None: it is compiled anew, and kept nowhere.

        Returns:
            Their version, which programs are compiled for; "" where there are none, which the log says once.
        """
        with self._lock:
            if self._reason is not None:
                return ""
            try:
                if self._compiler is None:
                    self._compiler = _Compiler(self.sources)
                for name in sorted(set(names) - self._names):
                    self._load(self._compiler, name, folder)
                    self._names.add(name)
            except Unavailable as error:
                self._reason = str(error)
                if self._reason not in _told:
                    _told.add(self._reason)
                    logger.warning("XLA computes what there are kernels for on CPUs: %s", error)
                return ""
            return self._compiler.version

    def why_not(self) -> str | None:
        """Why there are no kernels; None: nothing was in the way so far."""
        return self._reason

    def _load(self, compiler: _Compiler, name: str, folder: Path | None) -> None:
        kept = None if folder is None else folder / f"{name}_{compiler.version}.o"
        content = _read(kept)
        if content is None:
            logger.info("Compiling the kernel for %s, and keeping it for the next start", name)
            content = compiler.compile(self._module(name))
            _write(kept, content)
        engine = compiler.loaded(content)
        self._engines.append(engine)
        jax.local_devices(backend="cpu")  # without a client, XLA is told of targets later
        handler = jax.ffi.pycapsule(engine.get_function_address("handler"))
        target = target_name(name, compiler.version)
        jax.ffi.register_ffi_target(target, handler, platform="cpu", api_version=1)
        seen = (ctypes.c_int64 * len(call_frame.SEEN)).from_address(engine.get_global_value_address("seen"))
        if (reason := call_frame.why_not(tuple(seen))) is not None:
            raise Unavailable(f"{reason} (JAX {jax.__version__})")


def target_name(kernel: str, version: str) -> str:
    """Under which XLA knows a kernel."""
    return f"jaxllm_{kernel}_{version}"


def processor() -> tuple[str, frozenset[str]]:
    """LLVM's name of this processor, and of its features; nothing where it cannot be asked."""
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return "", frozenset()
    return llvm.get_host_cpu_name(), frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


class _Compiler:
    """LLVM's, for this processor."""

    def __init__(self, sources: Iterable[Path]):
        machine = platform.machine()
        if machine not in NEEDED:
            raise Unavailable(f"they are for {' and '.join(NEEDED)}, and this processor is {machine!r}")
        try:
            import llvmlite.binding as llvm
        except ImportError as error:
            raise Unavailable(f"llvmlite cannot be imported ({error}): pip install llvmlite") from error
        self._llvm = llvm
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        missing = [name for name in NEEDED[machine] if not features.get(name)]
        if missing:
            raise Unavailable(f"the processor lacks {', '.join(missing)}")
        #: where the processor multiplies and adds up pairs in one instruction, LLVM would take two for a shorter chain
        self._features = features.flatten() + (",+fast-dpwssd" if features.get("avx512vnni") else "")
        digest = hashlib.sha256()
        for source in sources:
            for path in sorted(source.glob("*.py")) if source.is_dir() else [source]:
                digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        llvmlite = importlib.metadata.version("llvmlite")
        digest.update(f"llvmlite {llvmlite} {llvm.get_host_cpu_name()} {self._features}".encode())
        #: of the sources, LLVM and the processor
        self.version = digest.hexdigest()[:16]

    def compile(self, kernel: Any) -> bytes:
        """An object file that has `handler`, of an llvmlite module."""
        llvm, target = self._llvm, self._target()
        # without the data layout, a module would get that of another machine
        header = f'target triple = "{target.triple}"\ntarget datalayout = "{target.target_data}"\n'
        whole = llvm.parse_assembly(header + call_frame.LLVM + work_sharing.LLVM + work_sharing.HANDLER)
        kernel.triple, kernel.data_layout = target.triple, str(target.target_data)
        whole.link_in(llvm.parse_assembly(str(kernel)))
        whole.verify()
        passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(whole, passes)
        return target.emit_object(whole)

    def loaded(self, content: bytes) -> Any:
        """The object file in memory, ready to run."""
        llvm = self._llvm
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._target())
        engine.add_object_file(llvm.ObjectFileRef.from_data(content))
        engine.finalize_object()
        return engine

    def _target(self) -> Any:
        return self._llvm.Target.from_default_triple().create_target_machine(
            cpu=self._llvm.get_host_cpu_name(), features=self._features, opt=2, reloc="pic", codemodel="jitdefault"
        )


def _read(path: Path | None) -> bytes | None:
    """What `_write` wrote; None: nothing that is whole."""
    if path is None:
        return None
    with contextlib.suppress(OSError):
        return kept_files.read(path)
    return None


def _write(path: Path | None, content: bytes) -> None:
    """Keep a file; where that fails, the next process compiles again."""
    if path is None:
        return
    try:
        kept_files.write(path, content)
    except OSError as error:
        logger.info("Compiled kernels cannot be kept in %s: %s", path.parent, error)
