"""Compiled programs on disk, found again without tracing them.

JAX's own compile cache asks for the lowered program first, which takes longer than loading what it finds. Here a
program has two names. One is a hash of everything that decides what will be traced: configuration, shapes, sources,
versions, machine. The other is a hash of the lowered program, so that an edit that changes no program compiles none.

The folder may be one that this user can only read, a team's for example: what it has is used.

Files are trusted as JAX's compile cache is: who can write to the folder can run code in this process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from jaxllm.runner.compile.identity import described, environment, sources
from pallas_kernels import kept_files

logger = logging.getLogger("jaxllm")

#: first bytes of a file
_MAGIC = b"jaxllm program 2\n"
#: of a lowered program that calls back into this process, at addresses that mean nothing in another
_CALLBACK = "callback"
#: what a lowered program's text does not show and a compiled one has: the names of exchanges (`context.exchanged`)
_NAMES = "over"
#: errors of a folder that others may write to
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
#: how object files begin: ELF, Mach-O
_OBJECT_FILES = (b"\x7fELF", b"\xcf\xfa\xed\xfe")


class ProgramStore:
    """Compiled programs for some devices, in a folder. May be used by several threads and processes at once.

    Args:
        options: of the compiler.
        source: what the programs are made of, see `described`. Where it cannot be described (it has code of the
            user's), programs are found by their lowered text alone.
    """

    def __init__(self, folder: Path, devices: Sequence[Any], options: dict[str, str | bool], source: Any):
        self._folder, self._devices, self._options = folder, list(devices), options
        self._environment = environment(self._devices) + described(options)
        self._keeps = True
        #: keys of the programs that were compiled, not loaded
        self.compiled: set[tuple[Any, ...]] = set()
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._source: str | None = None
        with contextlib.suppress(TypeError):
            self._source = sources() + described(source)

    def find(self, key: tuple[Any, ...]) -> jax.stages.Compiled | None:
        """The program of a key, where one was kept that was traced from the same source in the same environment."""
        path = self._name(key)
        if path is None or (name := self._read(path)) is None:
            return None
        return self._load(self._folder / name.decode())

    def compile(
        self, key: tuple[Any, ...], lowered: jax.stages.Lowered, own_options: Mapping[str, str | bool] | None = None
    ) -> jax.stages.Compiled:
        """The program of a key: loaded where the same lowered program was kept, else compiled and kept.

        Args:
            own_options: of the compiler, for this program besides those for all.
        """
        options = {**self._options, **(own_options or {})}
        text = lowered.as_text()
        if _CALLBACK in text:
            self.compiled.add(key)
            return lowered.compile(compiler_options=options)
        trees = f"{lowered.in_tree} {lowered.out_tree}"
        path = self._folder / f"{_hash(self._environment, described(options), trees, text, _NAMES)}.program"
        compiled = self._load(path)
        if compiled is None:
            compiled = lowered.compile(compiler_options=options)
            self.compiled.add(key)
            try:
                content = pickle.dumps(serialize(compiled))
            except (TypeError, ValueError, NotImplementedError, pickle.PicklingError, jax.errors.JaxRuntimeError) as e:
                logger.debug("The program for %s cannot be kept: %s", key, e)
                return compiled
            if not self._has_code(content):
                logger.debug("The program for %s came out of JAX's own cache and cannot be kept again", key)
                return compiled
            self._write(path, content)
        if (name := self._name(key)) is not None:
            self._write(name, path.name.encode())
        return compiled

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether `find` will most probably find the program; reads nothing."""
        name = self._name(key)
        return name is not None and os.path.exists(name)  # whose parent may be hidden

    def size(self, key: tuple[Any, ...]) -> int | None:
        """Bytes of the kept program of a key; None: none is kept that is found by its key."""
        path = self._name(key)
        name = None if path is None else self._read(path)
        try:
            return None if name is None else (self._folder / name.decode()).stat().st_size
        except OSError:
            return None

    def _name(self, key: tuple[Any, ...]) -> Path | None:
        if self._source is None:
            return None
        return self._folder / f"{_hash(self._environment, self._source, described(key))}.name"

    def _has_code(self, content: bytes) -> bool:
        """Whether a serialized program can run. XLA:CPU keeps no machine code of programs that it has loaded: what it
        serializes of them loads, and fails when it runs. JAX hands such programs out even where its cache is off by
        now, since it remembers in memory what it compiled or loaded before.
        """
        return self._devices[0].platform != "cpu" or any(magic in content for magic in _OBJECT_FILES)

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        content = self._read(path)
        if content is None:
            return None
        try:
            program, in_tree, out_tree = pickle.loads(content)
            client = self._devices[0].client
            return deserialize_and_load(program, in_tree, out_tree, client, execution_devices=self._devices)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the program can be compiled again
            logger.warning("The compiled program %s cannot be loaded and is compiled anew: %s", path, error)
            return None

    def _read(self, path: Path) -> bytes | None:
        """What `_write` wrote; None, with a warning, when it is something else."""
        try:
            content = kept_files.read(path, magic=_MAGIC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_once("reading", "Programs of the compile cache cannot be read, and are made anew: %s", error)
            return None
        if content is None:
            logger.warning("%s is damaged, and is made anew", path)
        return content

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file that is there as a whole or not at all. What fails once is not tried again."""
        if not self._keeps:
            return
        try:
            kept_files.write(path, content, magic=_MAGIC)
        except OSError as error:
            self._keeps = False
            if error.errno in _READ_ONLY:
                self._warn_once(
                    "writing",
                    "The compile cache in %s can only be read (%s): what it does not have is compiled at every start. "
                    "Set JAXLLM_CACHE to a folder that can be written to keep it.",
                    self._folder,
                    error.strerror,
                )
            else:
                self._warn_once(
                    "writing",
                    "The compile cache keeps no more programs, which are compiled again at the next start: %s",
                    error,
                )

    def _warn_once(self, about: str, message: str, *arguments: object) -> None:
        with self._lock:
            if about in self._warned:
                return
            self._warned.add(about)
        logger.warning(message, *arguments)


def open_store(
    folder: Path | None, devices: Sequence[Any], options: dict[str, str | bool], source: Any
) -> ProgramStore | None:
    """A store in `folder`, which may be read-only; None where the user configured a compile cache in JAX, or turned
    compile caches off there, or where there is no folder and none can be made.
    """
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    # one that was configured earlier in this process would still answer, with programs that cannot be kept again
    compilation_cache.reset_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning(
            "No compile cache: cannot write to %s (%s). Set JAXLLM_CACHE to a folder that can be written.",
            folder,
            error.strerror,
        )
        return None
    return ProgramStore(folder, devices, options, source)


def _hash(*parts: str) -> str:
    """Of the parts, and of the files' form: what an earlier one has is never asked for."""
    return hashlib.sha256(_MAGIC + "\0".join(parts).encode()).hexdigest()
