"""The endpoints that pool prompts: embeddings, what a model's pooler makes, and how well texts fit."""

from __future__ import annotations

import asyncio
import base64
import functools
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxllm.api.errors import ValidationError
from jaxllm.entrypoints.openai.bodies import (
    ClassifyBody,
    EmbeddingBody,
    PoolingBody,
    PoolingFields,
    RerankBody,
    ScoreBody,
)
from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.entrypoints.openai.requests import EMBEDDINGS, Call, pooling_params
from jaxllm.entrypoints.openai.responses import head
from jaxllm.entrypoints.serve.clients import while_there
from jaxllm.entrypoints.serve.json_answers import JSONAnswer
from jaxllm.entrypoints.serve.large_bodies import LargeBodies
from jaxllm.entrypoints.serve.service import Service, whole_answer


def routes(service: Service) -> APIRouter:
    """Return the endpoints."""
    router = APIRouter(route_class=LargeBodies)
    #: of classes, where the model has names for them
    labels: dict[Any, str] = service.engine.engine.vllm_config.model_config.hf_config.id2label or {}

    @router.post(EMBEDDINGS)
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        call = service.translator.translate(EMBEDDINGS, body)
        outputs = await while_there(request, service.whole(call, task="embed"))
        return await whole_answer(call, [_Embedded(output) for output in outputs])

    @router.post("/pooling")
    async def pooling(body: PoolingBody, request: Request) -> Response:
        call = _call(service, body, body.input)
        outputs = await while_there(request, service.whole(call, task=body.task))
        arrays = [np.asarray(output.outputs.data, "<f4") for output in outputs]
        data: list[Any] = [array.tolist() for array in arrays]
        if body.encoding_format == "base64":
            data = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        listed = [{"index": index, "object": "pooling", "data": one} for index, one in enumerate(data)]
        return JSONAnswer({**head(call), "data": listed, "usage": _usage(outputs)})

    @router.post("/classify")
    async def classify(body: ClassifyBody, request: Request) -> Response:
        call = _call(service, body, body.input)
        outputs = await while_there(request, service.whole(call, task="classify"))
        arrays = [np.asarray(output.outputs.data, np.float64) for output in outputs]
        data = [
            {
                "index": index,
                "label": labels.get(int(array.argmax())),
                "probs": array.tolist(),
                "num_classes": len(array),
            }
            for index, array in enumerate(arrays)
        ]
        told = {**head(call), "object": "list", "data": data, "usage": _usage(outputs)}
        return JSONAnswer({**told, "id": told["id"].replace("embd-", "classify-", 1)})

    @router.post("/score")
    @router.post("/v1/score")
    async def score(body: ScoreBody) -> Response:
        call = _call(service, body, [])
        outputs = await _scores(service, call, body.text_1, body.text_2)
        listed = [{"index": i, "object": "score", "score": one.outputs.score} for i, one in enumerate(outputs)]
        return JSONAnswer({**head(call), "data": listed, "usage": _usage(outputs)})

    @router.post("/rerank")
    @router.post("/v1/rerank")
    @router.post("/v2/rerank")
    async def rerank(body: RerankBody) -> Response:
        call = _call(service, body, [])
        outputs = await _scores(service, call, body.query, body.documents)
        results = [
            {"index": index, "document": {"text": text}, "relevance_score": output.outputs.score}
            for index, (text, output) in enumerate(zip(body.documents, outputs, strict=True))
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        kept = results if body.top_n is None else results[: body.top_n]
        return JSONAnswer({"id": head(call)["id"], "model": call.model, "results": kept, "usage": _usage(outputs)})

    return router


class _Embedded:
    """An output of `encode` as one of `LLM.embed`."""

    def __init__(self, output: Any):
        self.prompt_token_ids, self.error, self.outputs = output.prompt_token_ids, output.error, self
        self.embedding = output.outputs.data


def _call(service: Service, body: PoolingFields, prompts: list[Any]) -> Call:
    try:
        params = pooling_params(body)
    except ValidationError as error:
        raise APIError(str(error)) from error
    model = service.translator.model_name(body)
    own = {"lora_request": service.adapters.get(body.model), "priority": body.priority}
    return Call(url=EMBEDDINGS, model=model, prompts=prompts, pooling=params, **own)


async def _scores(service: Service, call: Call, first: Any, second: Any) -> list[Any]:
    """How well texts fit. It is one short call, which ends by itself and has its place until then, whether or not its
    client is still there.
    """
    sequences = max(len(one) if isinstance(one, list) else 1 for one in (first, second))
    with service.load.taken(sequences), service.told():
        score = service.engine.engine.pooling("score").score
        arguments = first, second, None, call.pooling, False, None, None, "raise", call.priority
        return await asyncio.to_thread(functools.partial(score, *arguments, lora_request=call.lora_request))


def _usage(outputs: list[Any]) -> dict[str, int]:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
