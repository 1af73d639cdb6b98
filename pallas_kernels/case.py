"""One configuration of a kernel, for whoever compiles, checks or times them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """A function and the shapes to compile it for, on any device."""

    operation: str
    #: what the configuration is: "Llama-3.1-8B decode, 64 sequences"
    label: str
    function: Callable[..., Any]
    #: trees of `jax.ShapeDtypeStruct`, without shardings
    arguments: tuple[Any, ...]
    #: positions of arguments whose memory the result takes over
    donated: tuple[int, ...] = ()
    #: most bytes of temporaries that the compiled function may need
    max_temporary_bytes: int | None = None
    #: (major, minor) that the kernel needs
    least_compute_capability: tuple[int, int] = (8, 0)
    #: the last that has what the kernel needs; None: all after it have
    last_compute_capability: tuple[int, int] | None = None

    def runs_on(self, compute_capability: tuple[int, int]) -> bool:
        """Whether a GPU has what the kernel needs."""
        last = self.last_compute_capability or compute_capability
        return self.least_compute_capability <= compute_capability <= last

    def shapes_on(self, sharding: jax.sharding.Sharding) -> tuple[Any, ...]:
        """`arguments`, placed."""
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, self.arguments)
