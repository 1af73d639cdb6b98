"""Adapters by the names that requests call them, in place of the model's."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator, Sequence

from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.engine.adapters import AdapterStore


def add_lora_modules_option(group: argparse._ArgumentGroup) -> None:
    """Add ``--lora-modules``."""
    group.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help='adapters that requests may name as their model, with --enable-lora; or {"name": ..., "path": ...} '
        "(default: none)",
    )


def lora_modules(given: Sequence[str]) -> list[tuple[str, str]]:
    """Names and folders of ``--lora-modules``. Raises ValidationError for what is neither form."""
    return [_module(text) for text in given]


def _module(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if text.lstrip().startswith("{"):
        try:
            module = json.loads(text)
        except ValueError as error:
            raise ValidationError(f"--lora-modules has {text!r}, which is no JSON: {error}") from None
        name, path = module.get("name"), module.get("path")
    if not (isinstance(name, str) and isinstance(path, str) and name and path):
        raise ValidationError(f'--lora-modules takes NAME=PATH or {{"name": ..., "path": ...}}, got {text!r}.')
    return name, path


class NamedAdapters:
    """The adapters of a server, or of a batch.

    Args:
        store: the engine's; None: it has none.
        taken: what the model is called.
    """

    def __init__(self, store: AdapterStore | None, taken: Sequence[str]):
        self._store, self._taken = store, taken
        self._named: dict[str, LoRARequest] = {}
        #: several may be loaded at once, each in a thread
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._named))

    def get(self, name: str | None) -> LoRARequest | None:
        """The adapter of this name, if there is one."""
        return None if name is None else self._named.get(name)

    def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Have an adapter.

        Args:
            in_place: of a name that is there, take the place of what has it.

        Raises:
            ValidationError: the engine takes none, the name is taken, or it cannot be loaded.
        """
        if self._store is None:
            raise ValidationError("LoRA is not enabled: start with --enable-lora.")
        with self._lock:
            known = self._named.get(name)
            if name in self._taken or (known is not None and not in_place):
                what = "the model itself" if name in self._taken else "load_inplace=true replaces it"
                raise ValidationError(f"The lora adapter {name!r} has already been loaded ({what}).")
            number = self._new_number() if known is None else known.lora_int_id
            self._store.add(LoRARequest(name, number, path, load_inplace=known is not None))
            # what comes later means this one, and does not load it anew
            self._named[name] = LoRARequest(name, number, path)

    def _new_number(self) -> int:
        """One that nobody has: neither others who use the engine as well, nor one of ours that could not be read."""
        assert self._store is not None
        ours = {request.lora_int_id for request in self._named.values()}
        return 1 + max(ours | self._store.numbers(), default=0)

    def unload(self, name: str, number: int | None = None) -> bool:
        """Have it no more; whether it was there.

        Args:
            number: of the adapter; None: whatever it is.

        Raises:
            ValidationError: the name has another number.
        """
        with self._lock:
            request = self._named.get(name)
            if request is None:
                return False
            if number not in (None, request.lora_int_id):
                raise ValidationError(
                    f"lora_int_id={number} is not {name!r}, whose number is {request.lora_int_id}: leave it out."
                )
            del self._named[name]
            if self._store is not None:
                self._store.remove(request.lora_int_id)
            return True
