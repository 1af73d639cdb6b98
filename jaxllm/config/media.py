"""How many items a prompt may have, and how large the plan expects them to be (`limit_mm_per_prompt`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.config.argument_checks import path_text

MODALITIES = ("image", "video")
#: vLLM's, where nothing is said
DEFAULT_COUNT = 999
_KEYS = {"image": ("count", "width", "height"), "video": ("count", "num_frames", "width", "height")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaLimit:
    """Of one modality."""

    count: int = DEFAULT_COUNT
    #: pixels of the largest item; None: what the processor makes of the largest
    width: int | None = None
    height: int | None = None
    #: the most of a video; None: what fits
    num_frames: int | None = None


def media_limits(name: str, value: Any) -> dict[str, MediaLimit]:
    """`limit_mm_per_prompt` in one form: {"image": 2}, {"image": {"count": 2, "width": 512, "height": 512}}.

    Raises:
        ValidationError: an unknown modality or key, or a value out of range.
    """
    if not isinstance(value, Mapping):
        raise ValidationError(f'{name} must be a dict such as {{"image": 2}}, got {value!r:.80}.')
    found: dict[str, MediaLimit] = {}
    for modality, given in value.items():
        if modality not in MODALITIES:
            if given == 0:  # asks for nothing
                continue
            raise ValidationError(
                f"{name} has the modality {modality!r}, which is not supported; supported: {', '.join(MODALITIES)}."
            )
        if isinstance(given, MediaLimit):
            found[modality] = given
            continue
        fields = given if isinstance(given, Mapping) else {"count": given}
        numbers: dict[str, int] = {}
        for key, number in fields.items():
            if number is None:  # as those of `MediaLimit` that nobody has set
                continue
            if key not in _KEYS[modality]:
                raise ValidationError(
                    f"{name}[{modality!r}] has the key {key!r}, which does not exist; there are "
                    f"{', '.join(_KEYS[modality])}."
                )
            numbers[key] = checks.integer(f"{name}[{modality!r}][{key!r}]", number)
            if numbers[key] < (least := 0 if key == "count" else 1):
                raise ValidationError(f"{name}[{modality!r}][{key!r}] must be at least {least}, got {number}.")
        if ("width" in numbers) != ("height" in numbers):
            raise ValidationError(f"{name}[{modality!r}] must have both width and height, or neither, got {given!r}.")
        found[modality] = MediaLimit(**numbers)
    return found


def domains(name: str, value: Any) -> tuple[str, ...]:
    """Names of hosts, in a list; or one, as a text."""
    given = (value,) if isinstance(value, str) else value
    found = tuple(checks.strings(name, given))
    wrong = next((host for host in found if not host or "/" in host or ":" in host), None)
    if wrong is not None:
        raise ValidationError(f"{name} must be names of hosts, such as ['example.org'], got {wrong!r}.")
    return found


def folder(name: str, value: Any) -> str:
    """A folder's path; "": none."""
    return "" if value == "" else path_text(name, value)
