"""jaxllm in a process of its own, told what to do as its peers are: ``python -m jaxllm.bench.worker``."""

from __future__ import annotations

from typing import Any

from jaxllm.bench.peers.protocol import serve
from jaxllm.bench.session import JaxLLMSession


def load(message: dict[str, Any]) -> JaxLLMSession:
    """The session that the message "load" describes."""
    from jaxllm.llm import LLM

    return JaxLLMSession(LLM(message["model"], **message["engine_args"]), detokenize=False)


if __name__ == "__main__":
    serve(load)
