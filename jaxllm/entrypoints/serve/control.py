"""The endpoints that tell of the server and change its state."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

import jaxllm
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter()
    engine = service.engine
    registry = engine.engine.watching.prometheus_registry()
    created = int(time.time())

    def model(name: str) -> dict[str, Any]:
        length = engine.engine.core.config.max_model_len
        return {"id": name, "object": "model", "created": created, "owned_by": "jaxllm", "max_model_len": length}

    @router.get("/v1/models")
    async def models() -> Response:
        return JSONAnswer({"object": "list", "data": [model(name) for name in service.settings.model_names]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in service.settings.model_names:
            raise APIError(f"The model `{name:.80}` does not exist.", status=404, param="model")
        return JSONAnswer(model(name))

    @router.get("/health")
    @router.get("/ping")
    @router.post("/ping")
    async def health() -> Response:
        if not engine.is_running:
            raise APIError("The engine has ended.", status=503)
        return Response()

    @router.get("/version")
    async def version() -> Response:
        return JSONAnswer({"version": jaxllm.__version__})

    @router.get("/load")
    async def load() -> Response:
        return JSONAnswer({"server_load": service.load.calls})

    @router.get("/metrics")
    async def metrics() -> Response:
        with service.told():
            return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
