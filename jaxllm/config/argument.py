"""An engine argument, written once: its field with the default, its check and its help."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError

#: the concerns of the engine's arguments, in the order in which ``--help`` lists them; "engine" has the rest
GROUPS = ("model", "cache", "scheduler", "parallel", "device", "output", "observability", "engine")


class Arguments:
    """A dataclass whose fields are made by `argument`: construction brings every value into its field's form.

    Raises:
        ValidationError: a value cannot be used; the text names it.
    """

    #: how errors name a field
    NAME = "{}"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType] (each subclass is a dataclass)
            value, has_default = getattr(self, field.name), True
            if value is None and field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
            elif value is None and (has_default := field.default is not dataclasses.MISSING):
                value = field.default
            if value is not None or not has_default:
                value = field.metadata["check"](self.NAME.format(field.name), value)
            object.__setattr__(self, field.name, value)


def argument(
    default: Any,
    check: Callable[[str, Any], Any],
    help: str | None,
    *,
    group: str = "engine",
    form: str | None = None,
    short: str | None = None,
    repr: bool = True,
    waits_for: str | None = None,
) -> Any:
    """A dataclass's field that is an engine argument.

    Args:
        default: a class stands for what it makes when it is called, ``dataclasses.MISSING`` for no default.
        check: (name, value) -> the value in the field's type; raises ValidationError. None, the default of everything,
            does not come to it.
        help: its line of the command line's ``--help``, which says what the default is where that is None; None: it is
            not listed there.
        group: one of `GROUPS`, under which it is listed.
        form: what its value looks like there, such as "BYTES", where type and check do not tell.
        short: a short form of its option, such as "-tp".
        repr: whether its value may be printed.
        waits_for: the capability without which it has one value.
    """
    made: dict[str, Any] = {"default_factory": default} if isinstance(default, type) else {"default": default}
    metadata = {"check": check, "help": help, "group": group, "form": form, "short": short, "waits_for": waits_for}
    return dataclasses.field(**made, repr=repr, metadata=metadata)


def switch(default: bool | None, help: str, *, group: str = "engine") -> Any:
    """An argument that is on or off; None: the engine knows whether it was given."""
    return argument(default, checks.boolean, help, group=group)


def not_yet(default: Any, capability: str, *others: Any, short: str | None = None) -> Any:
    """An argument of a capability that is still to come: `default` and `others` ask for nothing, the rest is refused.

    It is real otherwise: a field of its concern's configuration, and an option of the command line.
    """
    accepted = tuple(value for value in (default, *others) if value is not None)

    def check(name: str, value: Any) -> Any:
        refuse_unless(name, value, accepted, not_built(capability))
        value = value.lower() if isinstance(value, str) else value
        return value if value in accepted else default

    return argument(default, check, None, short=short, waits_for=capability)


def not_built(capability: str) -> str:
    return f"not supported yet: jaxllm does not have {capability} so far"


def refuse_unless(name: str, value: Any, accepted: tuple[Any, ...], why: str) -> None:
    """Raise ValidationError, saying what would be taken, unless `value` asks for nothing (`is_inert`)."""
    if not is_inert(value, accepted):
        values = " or ".join(repr(value) for value in accepted)
        remedy = f"Leave it out, or pass {values}." if values else "Leave it out."
        raise ValidationError(f"{name}={value!r} is {why}. {remedy}")


def is_inert(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether `value` asks for nothing beyond what jaxllm does anyway: it is accepted, None or empty."""
    if value is None or (isinstance(value, (str, list, tuple, dict, set)) and not value):
        return True
    return (value.lower() if isinstance(value, str) else value) in accepted
