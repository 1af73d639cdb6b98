"""Vectors, classes and scores of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import EMBED_TASKS
from jaxllm.api.pooling_outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    failed_pooling,
)
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.engine.io.pooling_inputs import PoolingInputs, TextPair
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.observe.progress import Progress
from jaxllm.methods.base import EngineMethods, refuse
from jaxllm.methods.prompts import as_prompts

Params = PoolingParams | Sequence[PoolingParams] | None
Pooled = PoolingRequestOutput[PoolingOutput]


class PoolingMethods(EngineMethods):
    """embed, encode, classify and score."""

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[EmbeddingRequestOutput]:
        """An embedding for each prompt, in the prompts' order.

        Args:
            prompts: text, token ids, a mapping (``prompt`` or ``prompt_token_ids``, and ``cache_salt``), or any
                iterable of them.
            pooling_params: one for all, or one each; None: the model's own defaults.
            tokenization_kwargs: ``truncate_prompt_tokens`` (-1: as many tokens as the model takes),
                ``truncation_side`` and ``add_special_tokens``.
            truncate_prompt_tokens: older place of it.
            lora_request: vLLM's; not supported yet.
            on_error: "raise" ends the call when a prompt is refused; "return" gives that prompt an output without
                data and its reason in ``error``.

        Raises:
            ValidationError: the model does not embed, or a prompt or its parameters are refused.
        """
        refuse(lora_request=lora_request)
        outputs = self._pool_all(
            prompts, "embed", "embed", pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens, on_error
        )
        return [EmbeddingRequestOutput.from_base(output) for output in outputs]

    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of the model's classes for each prompt. The arguments are those of `embed`."""
        refuse(lora_request=lora_request)
        outputs = self._pool_all(
            prompts, "classify", "classify", pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens,
            on_error,
        )  # fmt: skip
        return [ClassificationRequestOutput.from_base(output) for output in outputs]

    def encode(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[Pooled]:
        """What the model makes of each prompt, as arrays. The other arguments are those of `embed`.

        Args:
            pooling_task: "embed" or "classify", for one row a prompt; "token_embed" or "token_classify", for one row
                a token.
        """
        refuse(lora_request=lora_request)
        task = self._task(pooling_task)
        return self._pool_all(
            prompts, "encode", task, pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens, on_error
        )

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: one with one, one with many, or pairs of two lists.

        A model with one class reads both texts together (a cross-encoder); one that embeds gives the cosine of the
        two embeddings. The other arguments are those of `embed`.

        Raises:
            ValidationError: the model does neither, the lists' lengths do not fit, or a text is refused.
        """
        refuse(lora_request=lora_request, chat_template=chat_template)
        inputs = self._pooling("score")
        first, second = _texts("data_1", data_1), _texts("data_2", data_2)
        if len(first) != 1 and len(first) != len(second):
            raise ValidationError(
                f"Input lengths must be either 1:1, 1:N or N:N; got {len(first)} and {len(second)} texts."
            )
        if inputs.pooler.num_labels > 1:
            raise ValidationError(
                f"Scoring API is only enabled for num_labels == 1; this model has {inputs.pooler.num_labels}."
            )
        rest = (pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens, on_error)
        if inputs.pooler.num_labels == 1:
            many = first * len(second) if len(first) == 1 else first
            pairs = [TextPair(a, b) for a, b in zip(many, second, strict=True)]
            return [ScoringRequestOutput.from_base(o) for o in self._pool_all(pairs, "score", "classify", *rest)]
        outputs = self._pool_all(first + second, "score", "embed", *rest)
        left, right = outputs[: len(first)], outputs[len(first) :]
        return [_cosine(a, b, i) for i, (a, b) in enumerate(zip(left * (len(right) // len(left)), right, strict=True))]

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What the engine can be asked for: "generate", or the tasks of `encode`, and "score"."""
        inputs = self._started.pooling_inputs
        if inputs is None:
            return ("generate",)
        return inputs.pooler.tasks if inputs.pooler.num_labels > 1 else (*inputs.pooler.tasks, "score")

    def _task(self, pooling_task: str | None) -> str:
        """What `encode` is asked for."""
        task = pooling_task or self._pooling("encode").pooler.task
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

    def _pooling_request(
        self, method: str, task: str | None, params: PoolingParams | None
    ) -> tuple[PoolingInputs, PoolingParams]:
        """What makes a pooling request, and its parameters. Raises ValidationError for a task that cannot be done."""
        inputs, task = self._pooling(method), self._task(task)
        if task not in inputs.pooler.tasks:
            raise ValidationError(_unsupported(task, inputs))
        return inputs, _with_task(PoolingParams() if params is None else params, task)

    def _pooling(self, method: str) -> PoolingInputs:
        inputs = self._started.pooling_inputs
        if inputs is None:
            raise ValidationError(
                f"LLM.{method}() is only supported for pooling models. Try passing `--runner pooling` to use the model "
                'as a pooling model: LLM(..., runner="pooling").'
            )
        return inputs

    def _pool_all(
        self,
        prompts: Any,
        method: str,
        task: str,
        given: Params,
        use_tqdm: bool | Callable[..., Any],
        tokenization_kwargs: Mapping[str, Any] | None,
        truncate_prompt_tokens: int | None,
        on_error: str,
    ) -> list[Pooled]:
        inputs = self._pooling(method)
        if task not in inputs.pooler.tasks:
            raise ValidationError(_unsupported(task, inputs))
        prompts = prompts if prompts and _are_pairs(prompts) else as_prompts(prompts)
        if isinstance(given, (list, tuple)):
            params: Any = [_with_task(item, task) for item in given]
        else:
            params = _with_task(PoolingParams() if given is None else given, task)
        if truncate_prompt_tokens is not None:
            tokenization_kwargs = {"truncate_prompt_tokens": truncate_prompt_tokens, **(tokenization_kwargs or {})}
        options = inputs.options(tokenization_kwargs, params if isinstance(params, list) else [params])
        feed = self._feed(prompts, params, inputs=inputs, options=options, on_error=on_error)
        with Progress(len(prompts) if isinstance(prompts, Sized) else None, enabled=bool(use_tqdm)) as progress:
            outputs = sorted(feed.outputs(progress), key=lambda output: output.index)
        return [output if isinstance(output, PoolingRequestOutput) else _failed(output) for output in outputs]


def _are_pairs(prompts: Any) -> bool:
    return isinstance(prompts, list) and isinstance(prompts[0], TextPair)


def _with_task(params: Any, task: str) -> PoolingParams:
    if not isinstance(params, PoolingParams):
        raise TypeError(f"pooling_params must be PoolingParams, got {type(params).__name__}")
    if params.task not in (None, task):
        raise ValidationError(f"You cannot overwrite params.task={params.task!r} with task={task!r}!")
    return dataclasses.replace(params, task=task)


def _failed(output: Any) -> Pooled:
    """What the engine says of a request that never ran, as an output of this kind."""
    return failed_pooling(output.request_id, output.error or "", index=output.index)


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
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise ValidationError(f"{name} must be a text or a list of texts, got {data!r:.80}")
    texts = list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValidationError(f"{name} must be a text or a list of texts; one of them is {wrong!r:.80}")
    if not texts:
        raise ValidationError(f"At least one text element must be given: {name} is empty.")
    return texts


def _cosine(a: Pooled, b: Pooled, index: int) -> ScoringRequestOutput:
    error = a.error or b.error
    score = float("nan")
    if error is None:
        x, y = a.outputs.data.astype(np.float64), b.outputs.data.astype(np.float64)
        score = float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12))
    return ScoringRequestOutput(
        request_id=f"{a.request_id}_{b.request_id}",
        outputs=ScoringOutput(score=score),
        prompt_token_ids=[*a.prompt_token_ids, *b.prompt_token_ids],
        finished=True,
        num_cached_tokens=a.num_cached_tokens + b.num_cached_tokens,
        metrics=b.metrics,
        error=error,
        index=index,
    )
