"""What a compiled program of XLA:GPU does: its launches, and what each kernel needs.

XLA runs a program as a tree of thunks (a launch, a copy, a loop, ...). The serialized executable holds the tree as
``xla.gpu.ThunkProto`` messages; the numbers below are those of ``xla/backends/gpu/runtime/thunk.proto``,
``custom_kernel.proto``, ``launch_dimensions.proto`` and ``xla/service/gpu/gpu_executable.proto``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from . import cubin
from .cubin import KernelCode
from .records import fields, records

#: repeated ThunkProto of a GpuExecutableProto
_THUNKS = 13
_SEQUENTIAL, _CONDITIONAL, _WHILE, _KERNEL, _COPY, _CUSTOM_CALL, _CUSTOM_KERNEL = 2, 6, 7, 8, 13, 30, 36
#: thunks around others, and the field that those are in: dynamic slices (two generations), asynchronous ones
_WRAPPERS = {18: 1, 60: 6, 57: 3}
#: what is no launch by itself
_WAITS = (37, 49, 58)
_NAMES = {
    3: "copy",
    _COPY: "copy",
    4: "copy to the host",
    5: "copy from the host",
    9: "cuBLAS",
    15: "cuDNN",
    19: "fill",
    20: "select k",
    22: "cuBLASLt",
    28: "fill",
    _CUSTOM_CALL: "custom call",
    48: "copy of a slice",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One thing that the host has the GPU do."""

    name: str
    #: "kernel", or one of `_NAMES`
    kind: str
    #: None: the machine code is not in the executable
    code: KernelCode | None = None
    threads_per_block: int = 0
    #: bytes of shared memory asked for at launch, beside what is fixed in the code
    dynamic_shared: int = 0
    #: of a copy from one place on the device to another
    copied_bytes: int = 0

    @property
    def shared(self) -> int:
        return self.dynamic_shared + (self.code.static_shared if self.code else 0)


def read_executable(serialized: bytes) -> tuple[Launch, ...]:
    """A program's launches in their order, those in a loop once; of a branch, those of all branches.

    Raises:
        ValueError: the format is not the one that is known here.
    """
    parts = records(serialized)
    code: dict[str, KernelCode] = {}
    for part in parts[:-1]:
        if part.startswith(cubin.MAGIC):
            code.update(cubin.kernels(part))
    thunks = [value for number, value in fields(parts[-1]) if number == _THUNKS]
    if not thunks:
        raise ValueError("the serialized executable has no thunks")
    return tuple(launch for thunk in thunks for launch in _read(thunk, code))


def _read(thunk: Any, code: dict[str, KernelCode]) -> Iterator[Launch]:
    name, kind, body = "", 0, b""
    for number, value in fields(thunk):
        if number == 1:
            name = _text(_first(value, 1))
        else:
            kind, body = number, value
    if kind == _WHILE:
        # the condition, then the body
        for number in (2, 3):
            yield from _sequence(_first(body, number), code)
    elif kind == _SEQUENTIAL:
        yield from _sequence(body, code)
    elif kind == _CONDITIONAL:
        for branch in _all(body, 2):
            yield from _sequence(branch, code)
    elif kind in _WRAPPERS:
        yield from _sequence(_first(body, _WRAPPERS[kind]), code)
    elif kind == _KERNEL:
        kernel = _text(_first(body, 3))
        threads = _first(_first(body, 4), 2)
        yield _launch(name, code.get(kernel), threads, _first(body, 6))
    elif kind == _CUSTOM_KERNEL:
        kernel = _first(body, 3)
        spec = _first(kernel, 2)
        own = _cubins(spec)
        yield _launch(name, own.get(_text(_first(spec, 4))), _first(kernel, 4), _first(kernel, 6))
    elif kind not in _WAITS:
        target = f" {_text(_first(body, 1))}" if kind == _CUSTOM_CALL else ""
        # a custom call brings its own code, and launches it in its own way: block and shared memory are not told
        own = list(_cubins(body).values()) if kind == _CUSTOM_CALL else []
        copied = (_first(_first(body, 1), 3) or _first(body, 3) or 0) if kind == _COPY else 0
        yield Launch(
            name=f"{name}{target}", kind=_NAMES.get(kind, f"thunk {kind}"), code=_largest(own), copied_bytes=copied
        )


def _launch(name: str, code: KernelCode | None, dimensions: Any, shared: Any) -> Launch:
    threads = 1
    for size in fields(_first(dimensions, 1) or b""):
        threads *= int(size[1])  # pyright: ignore[reportArgumentType]
    return Launch(name=name, kind="kernel", code=code, threads_per_block=threads, dynamic_shared=shared or 0)


def _sequence(message: Any, code: dict[str, KernelCode]) -> tuple[Launch, ...]:
    return tuple(launch for thunk in _all(message, 1) for launch in _read(thunk, code))


def _cubins(message: Any) -> dict[str, KernelCode]:
    found: dict[str, KernelCode] = {}
    at = message.find(cubin.MAGIC)
    while at >= 0:
        if cubin.is_cubin(message[at:]):
            found.update(cubin.kernels(message[at:]))
        at = message.find(cubin.MAGIC, at + 1)
    return found


def _largest(codes: list[KernelCode]) -> KernelCode | None:
    """The most of each that any kernel takes; None: there is none."""
    if not codes:
        return None
    return KernelCode(
        **{field.name: max(getattr(c, field.name) for c in codes) for field in dataclasses.fields(KernelCode)}
    )


def _all(message: Any, wanted: int) -> list[Any]:
    return [value for number, value in fields(message or b"") if number == wanted]


def _first(message: Any, wanted: int) -> Any:
    return next(iter(_all(message, wanted)), None)


def _text(value: Any) -> str:
    return (value or b"").decode()
