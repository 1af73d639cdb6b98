"""The page at ``/``: a talk with the model, and how the engine is doing."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.service import Service

#: the page loads nothing from elsewhere, and no other page shows it in a frame
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; form-action 'none'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("jaxllm.entrypoints.serve")
    html, script = (folder.joinpath(name).read_bytes() for name in ("page.html", "page.js"))

    @router.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    @router.get("/page.js")
    async def page_script() -> Response:
        return Response(script, media_type="text/javascript")

    @router.get("/stats")
    async def stats() -> Response:
        with service.told():
            now = service.engine.engine.core.stats()
        return JSONAnswer(
            {
                "model": service.settings.model_names[0],
                "running": now.scheduler.num_running,
                "waiting": now.scheduler.num_waiting,
                "kv_cache_usage": now.scheduler.kv_cache_usage,
                "prefix_cache_hit_rate": now.prefix_cache_hit_rate,
                "prompt_tokens": now.prompt_tokens,
                "generation_tokens": now.generation_tokens,
                "memory_plan": str(service.engine.engine.memory_plan),
            }
        )

    return router
