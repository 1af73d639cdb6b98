"""What a notebook keeps of an engine that a cell shows: its text, and not the engine.

IPython puts whatever a cell's last line gives into `Out`, `_` and their like, where it stays. An engine there would
keep its memory for as long as the notebook runs, also when the cell is run again and its name means a new one.
"""

from __future__ import annotations

import logging
import sys
import weakref
from typing import Any

logger = logging.getLogger("jaxllm")


def shown(face: object, include: Any = None, exclude: Any = None) -> dict[str, str]:
    """The text of an object that is a face of an engine, for `_repr_mimebundle_`: IPython asks for it on its way to
    `Out`, where a `Shown` takes the object's place when the cell has ended.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is not None:
        _replace_after_cell(shell, weakref.ref(face), repr(face))
    return {"text/plain": repr(face)}


class Shown:
    """An object that a cell has shown, as long as somebody else has it: its text, and what else it is asked for."""

    def __init__(self, text: str, face: weakref.ref[Any]):
        self._text, self._face = text, face

    def __repr__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        face = self._face()
        if face is None:
            raise AttributeError(
                f"{name}: the engine has been freed, as IPython's Out does not keep it. Give it a name: llm = LLM(...)"
            )
        return getattr(face, name)


def _replace_after_cell(shell: Any, face: weakref.ref[Any], text: str) -> None:
    def replace(result: Any = None) -> None:
        shell.events.unregister("post_run_cell", replace)
        found, handle = face(), Shown(text, face)
        if found is None:
            return
        # which other faces may have
        engine = weakref.ref(getattr(found, "engine", found))
        names = ("_", "__", "___", *(f"_{number}" for number in shell.user_ns.get("_oh", ())))
        places = [(shell.user_ns.get("_oh", {}), None), (shell.user_ns, names), (shell.user_ns_hidden, names)]
        for place, wanted in places:
            for name in [name for name in wanted or place if place.get(name) is found]:
                place[name] = handle
        for name in ("_", "__", "___"):
            if getattr(shell.displayhook, name, None) is found:
                setattr(shell.displayhook, name, handle)
        for kept in (result, shell.last_execution_result):
            if kept is not None and kept.result is found:
                kept.result = handle
        del found
        if engine() is None:
            logger.info("The engine that this cell showed had no name, and is freed. To keep it: llm = LLM(...)")

    shell.events.register("post_run_cell", replace)
