"""Python imports it at the start of every example: engines start small, where a script leaves it open.

Scripts of vLLM's are written for GPUs, and would compile for hundreds of requests at once here.
"""

from __future__ import annotations

import os
from typing import Any

import jaxllm.config.engine_args as module

SMALL: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 512}
_engine_args = module.engine_args


def engine_args(model: str | os.PathLike[str], **arguments: Any) -> module.EngineArgs:
    given = {name: value for name, value in arguments.items() if name not in SMALL or value not in (None, False)}
    return _engine_args(model, **{**SMALL, **given})


module.engine_args = engine_args
