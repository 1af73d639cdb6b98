"""The endpoints between texts and token ids."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxllm.api.errors import ValidationError
from jaxllm.engine.io.prompts import TokenizationOptions, holds_media
from jaxllm.entrypoints.openai.bodies import DetokenizeBody, TokenizeBody
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.serve import large_bodies
from jaxllm.entrypoints.serve.clients import while_there
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.service import Service


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(route_class=large_bodies.LargeBodies)
    engine = service.engine.engine

    async def beside(request: Request, *work: Any, slow: bool = False) -> Any:
        """What `work` returns, done by a thread that tokenizes."""
        with service.told():
            return await while_there(request, asyncio.wrap_future(engine.pool.submit(*work, slow=slow)))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        service.translator.model_name(body)
        prompt: Any = body.prompt
        if body.messages is not None:
            prompt = await large_bodies.beside(request, service.translator.chat_prompt, body.messages, body)
        options = TokenizationOptions(add_special_tokens=body.add_special_tokens)
        (read,) = await beside(request, engine.inputs.reader.read, [prompt], options, slow=holds_media(prompt))
        if isinstance(read, ValidationError):
            raise APIError(str(read)) from read
        ids = list(read.token_ids)
        answer = {"count": len(ids), "max_model_len": engine.core.config.max_model_len, "tokens": ids}
        texts = None
        if body.return_token_strs:
            texts = await beside(request, engine.get_tokenizer().convert_ids_to_tokens, ids)
        return JSONAnswer({**answer, "token_strs": texts})

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        service.translator.model_name(body)
        with service.told():
            tokenizer = engine.get_tokenizer()

        def text() -> Any:
            size = len(tokenizer)
            for token in body.tokens:
                if not 0 <= token < size:
                    raise APIError(f"Token id {token} is out of vocabulary", param="tokens")
            return tokenizer.decode(body.tokens)

        return JSONAnswer({"prompt": await beside(request, text)})

    return router
