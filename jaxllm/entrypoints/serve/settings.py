"""What a server is asked for, besides its engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

#: bytes of a request's body
MAX_BODY = 16 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server answers."""

    #: what the model is called; at least one
    model_names: tuple[str, ...]
    #: adapters, by the names that requests call in place of the model's, and their folders
    lora_modules: tuple[tuple[str, str], ...] = ()
    #: any of them opens the server; none: it is open
    api_keys: tuple[str, ...] = ()
    #: prompts that may wait while as many run as the engine runs at once; None: any number
    max_queue: int | None = None
    #: bytes of a request's body
    max_body: int = MAX_BODY
    #: what the server may be called in a request's Host; none, or "*": anything
    allowed_hosts: tuple[str, ...] = ()
    #: web pages of these origins may use the server; "*": of all
    allowed_origins: tuple[str, ...] = ()
    #: whether whoever may ask the model may also send it to sleep and reset its caches
    admin_endpoints: bool = False
    #: how the model writes calls of tools, a name of `openai.tools.parsers`; None: they are text
    tool_call_parser: str | None = None
    #: tells reasoning from the answer, a name of `config.structured_outputs.PARSERS`; None: nobody does
    reasoning_parser: str | None = None
    #: whether a request may bring a chat template
    trust_request_chat_template: bool = False
    #: what chat templates get where a request says nothing
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
