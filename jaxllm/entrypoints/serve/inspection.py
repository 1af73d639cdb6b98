"""The endpoints of vLLM's that look into the engine, stop it and let it go on: for who runs the server."""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
from fastapi import APIRouter, Query
from fastapi.params import Depends
from starlette.responses import Response

import jaxllm
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.service import Service

#: endpoints of vLLM's that are not there, and what is
_REFUSED = {
    **dict.fromkeys(
        ("/v1/audio/transcriptions", "/v1/audio/translations"),
        "jaxllm takes no audio: transcribe it elsewhere, and send the text to /v1/chat/completions.",
    ),
    **dict.fromkeys(
        ("/v1/messages", "/v1/messages/count_tokens"),
        "Anthropic's messages are not read: /v1/chat/completions takes OpenAI's, with the same tools, and /tokenize "
        "counts tokens.",
    ),
    "/collective_rpc": "No code is called over HTTP: LLM.collective_rpc does it in the engine's own process.",
    "/update_weights": "Weights are not taken over HTTP: LLM.update_weights takes them in the engine's own process.",
    "/scale_elastic_ep": "One process has all devices from its start: restart it with another --data-parallel-size.",
}


def routes(service: Service, admin: Sequence[Depends]) -> APIRouter:
    """Return the endpoints.

    Args:
        admin: what lets those through that run the server.
    """
    router, engine = APIRouter(), service.engine

    @router.get("/server_info", dependencies=admin)
    async def server_info(config_format: Annotated[Literal["text", "json"], Query()] = "text") -> Response:
        config = engine.vllm_config
        told: Any = str(config) if config_format == "text" else _plain(config)
        system = {
            "jaxllm": jaxllm.__version__,
            "jax": jax.__version__,
            "python": sys.version.partition(" ")[0],
            "platform": platform.platform(),
            "devices": [str(device) for device in jax.devices()],
        }
        return JSONAnswer({"vllm_config": told, "system_env": system})

    @router.post("/pause", dependencies=admin)
    async def pause(
        mode: Annotated[Literal["abort", "wait", "keep"], Query()] = "abort",
        clear_cache: bool = True,
    ) -> Response:
        with service.told():
            await engine.pause_generation(mode=mode, clear_cache=clear_cache)
        return JSONAnswer({"status": "paused"})

    @router.post("/resume", dependencies=admin)
    async def resume() -> Response:
        with service.told():
            await engine.resume_generation()
        return JSONAnswer({"status": "resumed"})

    @router.get("/is_paused")
    async def is_paused() -> Response:
        with service.told():
            return JSONAnswer({"is_paused": await engine.is_paused()})

    @router.post("/start_profile", dependencies=admin)
    async def start_profile() -> Response:
        with service.told():
            await engine.start_profile()
        return Response()

    @router.post("/stop_profile", dependencies=admin)
    async def stop_profile() -> Response:
        with service.told():
            await engine.stop_profile()
        return Response()

    @router.post("/reset_mm_cache", dependencies=admin)
    async def reset_mm_cache() -> Response:
        await engine.reset_mm_cache()
        return Response()

    for path, why in _REFUSED.items():
        router.add_api_route(path, _refusal(path, why), methods=["POST"], include_in_schema=False)
    return router


def _refusal(path: str, why: str) -> Any:
    async def refuse() -> Response:
        raise APIError(f"{path} is refused: {why}", status=501)

    return refuse


def _plain(value: Any) -> Any:
    """A configuration as JSON has it; what it has no form for is told as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
