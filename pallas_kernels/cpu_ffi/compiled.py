"""Kernels as machine code: compiled by LLVM, kept in a folder, loaded, and known to XLA.

Compiling a kernel takes a part of a second. What comes out is an object file without an address of the process that
made it, which a later process loads in a few hundredths of a second. LLVM comes with llvmlite, which is imported where
kernels are wanted, and nowhere else.

Programs can be traced before their kernels are there, since what they call follows from the kernels' names and version
(`later`); XLA must know them when it compiles or loads the program (`finish`).
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import logging
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
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
_is_later = contextvars.ContextVar("_is_later", default=False)
#: those of which some wait for `finish`
_waiting: dict[Kernels, None] = {}
#: whether XLA has asked a kernel for its metadata, and `call_frame` fits
_frame_fits = threading.Event()


class Unavailable(Exception):
    """Why there are no kernels."""


@contextlib.contextmanager
def later() -> Iterator[None]:
    """What is loaded within, by this thread, is known to XLA once `finish` has returned. The process's first kernel is
    loaded all the same, since it shows whether there can be any.
    """
    token = _is_later.set(True)
    try:
        yield
    finally:
        _is_later.reset(token)


def finish(program: Callable[[], str] | None = None) -> None:
    """Load what was left for later, by whatever thread, or wait for whoever loads it. LLVM leaves the interpreter to
    others meanwhile.

    Args:
        program: the text of a program, which calls what is to be there; None: everything.
    """
    if waiting := list(_waiting):
        text = None if program is None else program()
        for kernels in waiting:
            kernels.finish(text)


@dataclasses.dataclass
class _Later:
    """A kernel that waits for `finish`."""

    #: where its machine code is kept
    folder: Path | None
    #: held by the thread that loads it
    lock: threading.Lock
    #: why it cannot be loaded, for those who have waited
    error: Exception | None = None


class Kernels:
    """The kernels of a process.

    Args:
        module: the llvmlite module of a kernel, by its name; it has a function `kernel` (`work_sharing`).
        sources: Python files, or folders of them, that a kernel's code follows from, besides this one's folder.
        parts: how launches are shared out (`work_sharing.PARTS`).
    """

    def __init__(
        self,
        module: Callable[[str], Any],
        sources: Iterable[Path],
        *,
        parts: tuple[int, int] = work_sharing.PARTS,
    ):
        self._module, self._parts, self.sources = module, parts, (Path(__file__).parent, *sources)
        self._lock = threading.Lock()
        #: those that XLA knows
        self._names: set[str] = set()
        #: by name
        self._later: dict[str, _Later] = {}
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
            Within `later`, they may be there only after `finish`.
        """
        names = set(names)
        with self._lock:
            if self._reason is not None:
                return ""
            try:
                self._compiler = self._compiler or _Compiler(self.sources)
            except Unavailable as error:
                return self._give_up(error)
            version = self._compiler.version
            for name in sorted(names - self._names):
                self._later.setdefault(name, _Later(folder, threading.Lock()))
                _waiting[self] = None
        if not (_is_later.get() and _frame_fits.is_set()):
            try:
                self._finish(names)
            except Unavailable as error:
                return self._give_up(error)
        return version if self._reason is None else ""

    def _give_up(self, error: Unavailable) -> str:
        """There are no kernels, which the log says once."""
        self._reason = str(error)
        self._later.clear()
        _waiting.pop(self, None)
        if self._reason not in _told:
            _told.add(self._reason)
            logger.warning("XLA computes what there are kernels for on CPUs: %s", error)
        return ""

    def finish(self, program: str | None) -> None:
        """Load those that `load` has left for later and a program's text names; None: all. One that fails waits no
        more, and is loaded when it is asked for again.
        """
        version = "" if self._compiler is None else self._compiler.version
        self._finish({name for name in list(self._later) if program is None or target_name(name, version) in program})

    def _finish(self, names: set[str]) -> None:
        for name, each in sorted(self._later.items()):
            if name not in names:
                continue
            with each.lock:
                if each.error is not None:
                    raise each.error
                if self._later.get(name) is not each:  # another thread has loaded it meanwhile
                    continue
                try:
                    assert self._compiler is not None
                    self._load(self._compiler, name, each.folder)
                    self._names.add(name)
                except Exception as error:
                    each.error = error
                    raise
                finally:
                    with self._lock:
                        self._later.pop(name, None)
                        if not self._later:
                            _waiting.pop(self, None)

    def why_not(self) -> str | None:
        """Why there are no kernels; None: nothing was in the way so far."""
        return self._reason

    def _load(self, compiler: _Compiler, name: str, folder: Path | None) -> None:
        kept = None if folder is None else folder / f"{name}_{compiler.version}.o"
        content = _read(kept)
        if content is None:
            logger.info("Compiling the kernel for %s, and keeping it for the next start", name)
            content = compiler.compile(self._module(name), self._parts)
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
        _frame_fits.set()


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

    def compile(self, kernel: Any, parts: tuple[int, int] = work_sharing.PARTS) -> bytes:
        """An object file that has `work_sharing.handler`, of an llvmlite module."""
        llvm, target = self._llvm, self._target()
        # without the data layout, a module would get that of another machine
        header = f'target triple = "{target.triple}"\ntarget datalayout = "{target.target_data}"\n'
        whole = llvm.parse_assembly(header + call_frame.LLVM + work_sharing.LLVM + work_sharing.handler(parts))
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
