"""Keyword arguments of methods that run requests: one that belongs elsewhere is an error that says where."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


def with_params(argument: str, kind: type) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """A decorator for methods that get what a request asks for as one argument.

    Args:
        argument: its name.
        kind: the dataclass that it is: a field of it among the keyword arguments is a TypeError that says so.
    """
    fields = {field.name for field in dataclasses.fields(kind)}

    def decorate(method: Callable[Given, Result]) -> Callable[Given, Result]:
        parameters = inspect.signature(method).parameters
        takes_others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        name = method.__qualname__

        @functools.wraps(method)
        def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            if "prompt_token_ids" in kwargs and "prompts" in parameters:
                args, kwargs = _with_token_ids(name, args, kwargs)  # pyright: ignore[reportAssignmentType]
            if not parameters.keys() >= kwargs.keys():
                unknown = {key: value for key, value in kwargs.items() if key not in parameters}
                misplaced = {key: value for key, value in unknown.items() if key in fields}
                if misplaced:
                    made = f"{kind.__name__}({_shown(misplaced)})"
                    raise TypeError(
                        f"{name}() has no argument {next(iter(misplaced))!r}, which is a field of {kind.__name__}: "
                        f"pass {argument}={made}."
                    )
                if not takes_others:
                    raise TypeError(f"{name}() has no argument {_elsewhere(unknown, list(parameters))}")
            return method(*args, **kwargs)

        return checked

    return decorate


def _with_token_ids(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A method's arguments with token ids where prompts are, which older versions of vLLM took beside them."""
    kwargs = dict(kwargs)
    token_ids = kwargs.pop("prompt_token_ids")
    if token_ids is None:
        return args, kwargs
    # the first one is the method's own object
    if (kwargs.get("prompts") if len(args) < 2 else args[1]) is not None:
        raise TypeError(f"{name}() takes texts or token ids: pass one of prompts and prompt_token_ids.")
    if len(args) < 2:
        return args, {**kwargs, "prompts": token_ids}
    return (args[0], token_ids, *args[2:]), kwargs


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.60}" for key, value in arguments.items())


def _elsewhere(unknown: Mapping[str, Any], parameters: list[str]) -> str:
    """The first of the arguments that are not there, and what there is in its place."""
    key, value = next(iter(unknown.items()))
    close = difflib.get_close_matches(key, parameters, n=1)
    if close:
        return f"{key!r}. Did you mean {close[0]!r}?"
    if "chat_template_kwargs" in parameters:
        # what other libraries hand on to the template
        return f"{key!r}. What the chat template knows goes into chat_template_kwargs={{{key!r}: {value!r:.60}}}."
    return f"{key!r}; it has {', '.join(name for name in parameters if name != 'self')}."
