"""Refusals are told to the caller, whose lines matter: the frames of this package are left out of their tracebacks."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from jaxllm.api.errors import JaxLLMError

#: what is no fault of the package
_REFUSALS = (JaxLLMError, KeyboardInterrupt)

Face = TypeVar("Face", bound=type)


class ShortTracebacks:
    """A context that a refusal, or Ctrl-C, leaves without its frames: the traceback begins where the context's function
    was called. Other errors keep theirs, and so do all with ``JAXLLM_FULL_TRACEBACK=1``.
    """

    def __enter__(self) -> None:
        self._handled = sys.exception()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if isinstance(error, _REFUSALS) and os.environ.get("JAXLLM_FULL_TRACEBACK", "0") in ("", "0"):
            error.__traceback__ = None
            # what the caller was handling, but not what led to the refusal, which its text tells
            error.__cause__ = None
            error.__context__ = self._handled if self._handled is not error else None
            error.__suppress_context__ = False  # which setting the cause has changed


def short_tracebacks(face: Face) -> Face:
    """Leave the frames of refusals out of all public methods of a class, and of its constructor."""
    for name, method in list(vars(face).items()):
        if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
            setattr(face, name, _short(method))
        elif isinstance(method, classmethod):
            setattr(face, name, classmethod(_short(method.__func__)))
    return face


def _short(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            with ShortTracebacks():
                return await method(*args, **kwargs)

        return awaited
    if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
        return method

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with ShortTracebacks():
            return method(*args, **kwargs)

    return called


def clear_frames(error: BaseException) -> None:
    """Let go of what the frames of an error hold, and those of the errors that led to it: whoever keeps an exception (a
    notebook does) would keep all of it.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            left += [found.__cause__, found.__context__]
