"""Vectors, classes and scores of many prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import was_refused
from jaxllm.api.pooler import EMBED_TASKS
from jaxllm.api.pooling_outputs import (
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    failed_pooling,
)
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.engine.io.call_prompts import as_prompts
from jaxllm.engine.io.pooling_inputs import PoolingInputs, TextPair
from jaxllm.engine.observe.progress import Progress

if TYPE_CHECKING:
    from jaxllm.engine.io.feeds import Feeds

Params = PoolingParams | Sequence[PoolingParams] | None
Pooled = PoolingRequestOutput[PoolingOutput]
Bar = bool | Callable[..., Any]


class Pooling:
    """The calls of one engine that pool prompts; `LLM`'s methods say what the arguments are.

    Args:
        inputs: makes the requests.
    """

    def __init__(self, feeds: Feeds, inputs: PoolingInputs):
        self._feeds, self.inputs = feeds, inputs

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of `LLM.encode` that the model does, and "score" where it scores."""
        pooler = self.inputs.pooler
        return pooler.tasks if pooler.num_labels > 1 else (*pooler.tasks, "score")

    def run(
        self,
        prompts: Any,
        task: str,
        given: Params,
        use_tqdm: Bar,
        tokenization_kwargs: Mapping[str, Any] | None,
        truncate_prompt_tokens: int | None,
        on_error: str,
        priority: int = 0,
        lora_request: Any = None,
    ) -> list[Pooled]:
        """What the model makes of each prompt, in their order."""
        self._check_task(task)
        prompts = prompts if _are_pairs(prompts) else as_prompts(prompts)
        if isinstance(given, (list, tuple)):
            params: Any = [_with_task(item, task) for item in given]
        else:
            params = _with_task(PoolingParams() if given is None else given, task)
        if truncate_prompt_tokens is not None:
            tokenization_kwargs = {"truncate_prompt_tokens": truncate_prompt_tokens, **(tokenization_kwargs or {})}
        options = self.inputs.options(tokenization_kwargs, params if isinstance(params, list) else [params])
        feed = self._feeds.feed(
            prompts,
            params,
            inputs=self.inputs,
            options=options,
            on_error=on_error,
            priority=priority,
            lora_request=lora_request,
        )
        with Progress(len(prompts) if isinstance(prompts, Sized) else None, enabled=bool(use_tqdm)) as progress:
            outputs = sorted(feed.outputs(progress), key=lambda output: output.index)
        return [output if isinstance(output, PoolingRequestOutput) else _failed(output) for output in outputs]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        chat_template: str | None,
        params: Params,
        use_tqdm: Bar,
        tokenization_kwargs: Mapping[str, Any] | None,
        *arguments: Any,
        lora_request: Any = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit; the arguments from the parameters on are `run`'s."""
        labels = self.inputs.pooler.num_labels
        first, second = _texts("data_1", data_1), _texts("data_2", data_2)
        if len(first) != 1 and len(first) != len(second):
            raise ValidationError(
                f"Input lengths must be either 1:1, 1:N or N:N; got {len(first)} and {len(second)} texts."
            )
        if labels > 1:
            raise ValidationError(f"Scoring API is only enabled for num_labels == 1; this model has {labels}.")
        if chat_template is not None and labels != 1:
            raise ValidationError(
                "chat_template writes two texts into one prompt, for models with one class; this one compares "
                "embeddings. Leave it out."
            )
        if labels == 1:
            many = first * len(second) if len(first) == 1 else first
            pairs: list[Any] = [TextPair(a, b) for a, b in zip(many, second, strict=True)]
            if chat_template is not None:
                pairs = [_templated(pair, chat_template) for pair in pairs]
                # as around any text: the template is not a chat's, which would write them
                tokenization_kwargs = {"add_special_tokens": True, **(tokenization_kwargs or {})}
            outputs = self.run(
                pairs, "classify", params, use_tqdm, tokenization_kwargs, *arguments, lora_request=lora_request
            )
            return [ScoringRequestOutput.from_base(output) for output in outputs]
        by_token = self.inputs.pooler.task == "token_embed"
        task = "token_embed" if by_token else "embed"
        outputs = self.run(
            first + second, task, params, use_tqdm, tokenization_kwargs, *arguments, lora_request=lora_request
        )
        left, right = outputs[: len(first)], outputs[len(first) :]
        measure = _max_sim if by_token else _cosine
        pairs = list(zip(left * (len(right) // len(left)), right, strict=True))
        return [_scored(a, b, i, measure) for i, (a, b) in enumerate(pairs)]

    def task(self, asked: str | None) -> str:
        """What `LLM.encode` is asked for. Raises ValidationError when nobody says it."""
        task = asked or self.inputs.pooler.task
        if task is None:
            raise ValidationError(
                "pooling_task required for `LLM.encode`\n"
                "Please use one of the more specific methods or set the pooling_task when using `LLM.encode`:\n"
                '  - For embeddings, use `LLM.embed(...)` or `pooling_task="embed"`.\n'
                '  - For classification logits, use `LLM.classify(...)` or `pooling_task="classify"`.\n'
                "  - For similarity scores, use `LLM.score(...)`.\n"
                '  - For rewards, `pooling_task="classify"` or `pooling_task="token_classify"`.\n'
                '  - For token classification, use `pooling_task="token_classify"`.\n'
                '  - For multi-vector retrieval, use `pooling_task="token_embed"`.'
            )
        return task

    def params(self, task: str | None, given: PoolingParams | None) -> PoolingParams:
        """The parameters of one request. Raises ValidationError for a task that the model does not do."""
        task = self.task(task)
        self._check_task(task)
        return _with_task(PoolingParams() if given is None else given, task)

    def _check_task(self, task: str) -> None:
        if task not in self.inputs.pooler.tasks:
            raise ValidationError(_unsupported(task, self.inputs))


def _are_pairs(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], TextPair)


def _with_task(params: Any, task: str) -> PoolingParams:
    if not isinstance(params, PoolingParams):
        raise TypeError(f"pooling_params must be PoolingParams, got {type(params).__name__}")
    if params.task not in (None, task):
        raise ValidationError(f"You cannot overwrite params.task={params.task!r} with task={task!r}!")
    return dataclasses.replace(params, task=task)


def _failed(output: Any) -> Pooled:
    """What the engine says of a request that never ran, as an output of this kind."""
    return failed_pooling(output.request_id, output.error or "", is_refused=was_refused(output), index=output.index)


def _unsupported(task: str, inputs: PoolingInputs) -> str:
    kind, convert = ("Embedding", "embed") if task in EMBED_TASKS else ("Classification", "classify")
    if task not in (*EMBED_TASKS, "classify", "token_classify"):
        return f"Unsupported task: {task!r} Supported tasks: {list(inputs.pooler.tasks)}"
    return (
        f"{kind} API is not supported by this model. Try converting the model using `--convert {convert}`: "
        f'LLM(..., convert="{convert}").'
    )


def _texts(name: str, data: Any) -> list[str]:
    texts = [data] if isinstance(data, str) else data
    checks.no_table(name, data)
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ValidationError(f"{name} must be a text or a list of texts, got {data!r:.80}")
    texts = list(texts)
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValidationError(f"{name} must be a text or a list of texts; {name}[{wrong}] is {texts[wrong]!r:.80}")
    if not texts:
        raise ValidationError(f"At least one text element must be given: {name} is empty.")
    return texts


def _templated(pair: TextPair, chat_template: str) -> dict[str, Any]:
    """A pair as a prompt that a template writes, which knows the texts by their roles."""
    messages = [{"role": "query", "content": pair.first}, {"role": "document", "content": pair.second}]
    return {"messages": messages, "chat_template": chat_template, "add_generation_prompt": False}


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12))


def _max_sim(x: np.ndarray, y: np.ndarray) -> float:
    """Each token of the first text finds its nearest of the second (ColBERT, arXiv:2004.12832)."""
    return float((x @ y.T).max(axis=1).sum())


def _scored(
    a: Pooled, b: Pooled, index: int, measure: Callable[[np.ndarray, np.ndarray], float]
) -> ScoringRequestOutput:
    error = a.error or b.error
    score = float("nan")
    if error is None:
        score = measure(a.outputs.data.astype(np.float64), b.outputs.data.astype(np.float64))
    return ScoringRequestOutput(
        request_id=f"{a.request_id}_{b.request_id}",
        outputs=ScoringOutput(score=score),
        prompt_token_ids=[*a.prompt_token_ids, *b.prompt_token_ids],
        finished=True,
        num_cached_tokens=a.num_cached_tokens + b.num_cached_tokens,
        metrics=b.metrics,
        error=error,
        is_refused=(a if a.error is not None else b).is_refused,
        index=index,
    )
