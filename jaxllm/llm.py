"""`LLM`: the engine as a library."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxllm.api import checks
from jaxllm.api.beam_search import BeamSearchOutput, BeamSearchParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.method_arguments import with_params
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.pooling_outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.api.tracebacks import clear_frames, short_tracebacks
from jaxllm.config.engine_args import EngineArgs, engine_args, refuse_to_set
from jaxllm.config.files import merged
from jaxllm.config.log import show_log
from jaxllm.engine.beam_search import beam_search
from jaxllm.engine.engine import Engine
from jaxllm.engine.interrupt import StartInterrupt
from jaxllm.engine.io.call_prompts import as_conversations, as_prompts, chat_prompt, with_processor_kwargs
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.io.text_stream import stream_text
from jaxllm.engine.observe.notebook import shown
from jaxllm.engine.observe.progress import bar_class
from jaxllm.startup.start import start
from jaxllm.tokenization.chat import Conversation
from jaxllm.tuning.advice.notice import Notice

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.metric import Metric
    from jaxllm.config.vllm_config import ModelConfig
    from jaxllm.engine.observe.prometheus import MetricsServer
    from jaxllm.engine.observe.trace import Trace
    from jaxllm.llm_engine import LLMEngine
    from jaxllm.planning.explanation import Explanation
    from jaxllm.runner.memory.plan import MemoryPlan
    from jaxllm.tuning.advice.advice import AdviceList

Result = TypeVar("Result")

OnOutput = Callable[[RequestOutput], object]
#: one for all prompts of a call, or one each
LoRARequests = LoRARequest | Iterable[LoRARequest | None] | None
PoolingParamsGiven = PoolingParams | Sequence[PoolingParams] | None


@short_tracebacks
class LLM:
    """A model and the engine that runs it, with vLLM's interface.

    Usable as a context manager; `shutdown` (or dropping the last reference) frees everything that it holds on the
    device.

    Args:
        model: a named model (``smollm2-135m-instruct``), a local directory, a ``.gguf`` file, or a hub id.
        **kwargs: vLLM's engine arguments; see `jaxllm.config.engine_args`.

    Raises:
        TypeError: an argument does not exist.
        ValidationError: an argument's value cannot be honoured, or the model does not fit into memory; the text says
            what would.
    """

    def __init__(self, model: str | os.PathLike[str], **kwargs: Any):
        #: what this is a face of, as other classes may be at the same time
        self.engine: Engine = start_engine(model, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLM:
        """An engine from arguments that are checked already."""
        return cls(**args.given())

    @classmethod
    def from_config(cls, path_or_name: str | os.PathLike[str], /, **overrides: Any) -> LLM:
        """An engine from a YAML file of engine arguments, or a shipped one's name ("throughput"); `overrides` win.

        Raises ValidationError for a file that is not one, and what the constructor raises.
        """
        model, arguments = merged(path_or_name, overrides)
        return cls(model, **arguments)

    @property
    def llm_engine(self) -> LLMEngine:
        """This engine, to be driven step by step. Its requests are this object's: each access shows the same ones."""
        from jaxllm.llm_engine import LLMEngine

        return LLMEngine(self)

    @property
    def model_config(self) -> ModelConfig:
        """The model as the engine runs it, under vLLM's names."""
        return self.engine.vllm_config.model_config

    @property
    def memory_plan(self) -> MemoryPlan:
        """What the device's memory holds, in bytes; prints as a table."""
        return self.engine.memory_plan

    @property
    def startup_times(self) -> dict[str, float]:
        """Seconds of each start-up phase."""
        return self.engine.startup_times

    def wait_until_ready(self) -> None:
        """Wait until all programs are there that steps do without at a first start: one text engine on one CPU answers
        as soon as it has those for steps of up to 32 tokens and for the largest, and gets the others beside its steps,
        which run in the smallest that is there. All other engines are ready when they have started.

        Raises:
            JaxLLMError: a program could not be compiled; steps go on in larger ones.
        """
        self.engine.wait_until_ready()

    def __repr__(self) -> str:
        return self.engine.describe("LLM")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return shown(self, include, exclude)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling_params uses: the model's generation_config.json, else vLLM's defaults."""
        return self.engine.default_params.clone()

    # Text.

    @with_params("sampling_params", SamplingParams)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the prompts' order.

        Calls from several threads share the engine's batches.

        Args:
            prompts: text, token ids, a mapping (``prompt``, ``prompt_token_ids``, ``prompt_embeds`` or ``messages``,
                and ``cache_salt``), or any iterable of them. What has no length is read by a thread of its own, as the
                engine has room: it may be endless, and it may be slow.
            sampling_params: one for all, or one each; None: the model's own defaults.
            use_tqdm: False shows no progress bar; a callable makes the bar, with tqdm's arguments.
            priority: smaller runs first, with ``scheduling_policy="priority"``.
            tokenization_kwargs: ``add_special_tokens``, ``truncate_prompt_tokens`` and ``truncation_side``.
            mm_processor_kwargs: how images are prepared: ``min_pixels`` and ``max_pixels``; a prompt's own go before.
            lora_request: the adapter of all, or one each, None for the model alone (``enable_lora=True``).
            on_error: "raise" ends the whole call when one prompt is refused, before anything has run if it is among
                the first 256 (or twice ``max_num_seqs``); "return" gives that prompt an output with
                ``finish_reason="error"`` and its reason in ``error``, and runs the others.
            on_output: takes each output when it is finished. Nothing is kept then, and the list is empty.

        Raises:
            ValidationError: a prompt or its parameters are refused.
        """
        self.engine.check_generates("generate")
        return self.engine.generation.run(
            with_processor_kwargs(as_prompts(prompts), mm_processor_kwargs), sampling_params, use_tqdm, on_output,
            priority=priority, on_error=on_error, tokenization_kwargs=tokenization_kwargs,
            lora_request=lora_request,
        )  # fmt: skip

    @with_params("sampling_params", SamplingParams)
    def chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        priority: int | Iterable[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        *,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many: lists of messages with ``role`` and ``content`` (text, or parts of text).

        The arguments are those of `generate`, and of the chat template (``tools``, ``chat_template_kwargs``, ...),
        which writes the special tokens: the tokenizer adds none.
        """
        self.engine.check_generates("chat")
        convert = functools.partial(
            chat_prompt,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        return self.engine.generation.run(
            as_conversations(messages), sampling_params, use_tqdm, on_output, priority=priority, on_error=on_error,
            tokenization_kwargs=tokenization_kwargs, convert=convert, lora_request=lora_request,
        )  # fmt: skip

    @with_params("sampling_params", SamplingParams)
    def as_completed(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        lora_request: LoRARequests = None,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts, and yield each output when it is finished; `RequestOutput.index` says whose it is.

        The arguments are those of `generate`. The engine works while the next output is asked for. Closing the
        iterator ends what still runs.
        """
        self.engine.check_generates("as_completed")
        return self.engine.generation.as_completed(
            as_prompts(prompts), sampling_params, use_tqdm, priority=priority, on_error=on_error,
            tokenization_kwargs=tokenization_kwargs, lora_request=lora_request,
        )  # fmt: skip

    @with_params("sampling_params", SamplingParams)
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Generator[str, None, None]:
        """The completion of one prompt, piece by piece as it is generated. Closing the iterator ends the request."""
        engine = self.engine
        engine.check_generates("stream")
        params = engine.default_params if sampling_params is None else sampling_params
        return stream_text(engine.client, engine.inputs, prompt, params, lora_request)

    @with_params("sampling_params", SamplingParams)
    def stream_chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
        **chat_options: Any,
    ) -> Generator[str, None, None]:
        """The answer to one conversation, piece by piece; `chat_options` are those of `chat`."""
        return self.stream(chat_prompt(messages, **chat_options), sampling_params, lora_request=lora_request)

    @with_params("params", BeamSearchParams)
    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        lora_request: LoRARequest | None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
        priority: int | None = None,
        *,
        request_ids: str | Sequence[str] | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest sequences of each prompt.

        A step asks for the 2 * beam_width most likely next tokens of every beam; the prefix cache has what beams share.

        Args:
            prompts: as in `generate`.
            concurrency_limit: prompts searched at the same time; None: all.
            request_ids: a name for each prompt, by which `abort` ends its search from another thread: its sequences are
                what there is, with ``finish_reason="abort"``, and the other prompts go on.

        Raises:
            ValidationError: a prompt is refused, or ``2 * beam_width`` is more than the engine's ``max_logprobs``.
            RuntimeError: the engine failed or was shut down by another call.
        """
        self.engine.check_generates("beam_search")
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, got {type(params).__name__}")
        if concurrency_limit is not None and checks.integer("concurrency_limit", concurrency_limit) < 1:
            raise ValidationError(f"concurrency_limit must be at least 1, got {concurrency_limit}.")
        listed = list(as_prompts(prompts))
        ids = None if request_ids is None else checks.strings("request_ids", request_ids)
        if ids is not None and not len(set(ids)) == len(ids) == len(listed):
            raise ValidationError(
                f"request_ids must be {len(listed)} different names, one for each prompt; got {ids!r:.80}."
            )
        return beam_search(
            self.engine.feeds, self.engine.inputs, listed, params, request_ids=ids, priority=priority,
            concurrency_limit=concurrency_limit, use_tqdm=use_tqdm, lora_request=lora_request,
        )  # fmt: skip

    # Submitting and collecting as two calls.

    @with_params("sampling_params", SamplingParams)
    def enqueue(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        lora_request: LoRARequests = None,
        priority: int | Iterable[int] | None = None,
        use_tqdm: bool = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Queue prompts and return their request ids; `wait_for_completion` runs them.

        The arguments are those of `generate`. All prompts are tokenized before this returns, without a progress bar.

        Raises:
            ValidationError: a prompt or its parameters are refused; nothing of the call is queued then.
        """
        self.engine.check_generates("enqueue")
        listed = with_processor_kwargs(as_prompts(prompts), mm_processor_kwargs)
        return self.engine.generation.enqueue(listed, sampling_params, priority, tokenization_kwargs, lora_request)

    @with_params("sampling_params", SamplingParams)
    def enqueue_chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequests = None,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        **chat_options: Any,
    ) -> list[str]:
        """`enqueue` for conversations; `chat_options` are the chat template's, as in `chat`."""
        self.engine.check_generates("enqueue_chat")
        prompts = [chat_prompt(conversation, **chat_options) for conversation in as_conversations(messages)]
        return self.engine.generation.enqueue(prompts, sampling_params, priority, tokenization_kwargs, lora_request)

    def wait_for_completion(
        self,
        output_type: type[Any] | tuple[type[Any], ...] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[RequestOutput]:
        """Run what was enqueued to its end; the outputs come in the order of submission.

        Raises:
            TypeError: an output is not of `output_type`.
            RuntimeError: the engine failed, in another call perhaps; nothing of what was enqueued is left then.
        """
        outputs = self.engine.generation.collect(use_tqdm)
        for output in outputs:
            if output_type is not None and not isinstance(output, output_type):
                raise TypeError(f"request {output.request_id} gave {type(output).__name__}, not {output_type}")
        return outputs

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests that another thread waits for: it gets what there is, with ``finish_reason="abort"``.

        Args:
            request_id: of `enqueue`, of `beam_search`, or of `LLMEngine.add_request`; unknown ones are passed over.
        """
        names = [request_id] if isinstance(request_id, str) else checks.strings("request_id", request_id)
        self.llm_engine.abort_request(names)

    # Vectors, classes and scores.

    @with_params("pooling_params", PoolingParams)
    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParamsGiven = None,
        lora_request: LoRARequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[EmbeddingRequestOutput]:
        """An embedding for each prompt, in the prompts' order.

        Of an engine with ``PoolerConfig(task="token_embed")``, what `encode` returns: a matrix in ``outputs.data``,
        a row for each token or chunk (`LateChunkingParams`).

        Args:
            prompts: text, token ids, a mapping (``prompt`` or ``prompt_token_ids``, and ``cache_salt``), or any
                iterable of them.
            pooling_params: one for all, or one each; None: the model's own defaults.
            tokenization_kwargs: ``truncate_prompt_tokens`` (-1: as many tokens as the model takes),
                ``truncation_side`` and ``add_special_tokens``.
            truncate_prompt_tokens: older place of it.
            lora_request: the adapter of all, or one each, None for the model alone (``enable_lora=True``).
            on_error: "raise" ends the call when a prompt is refused; "return" gives that prompt an output without
                data and its reason in ``error``.

        Raises:
            ValidationError: the model does not embed, or a prompt or its parameters are refused.
        """
        pooling = self.engine.pooling("embed")
        task = "token_embed" if pooling.inputs.pooler.task == "token_embed" else "embed"
        outputs = pooling.run(
            prompts, task, pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens, on_error,
            lora_request=lora_request,
        )  # fmt: skip
        if task == "token_embed":
            return outputs  # pyright: ignore[reportReturnType]
        return [EmbeddingRequestOutput.from_base(output) for output in outputs]

    @with_params("pooling_params", PoolingParams)
    def classify(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling_params: PoolingParamsGiven = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[ClassificationRequestOutput]:
        """Probabilities of the model's classes for each prompt. The arguments are those of `embed`."""
        outputs = self.engine.pooling("classify").run(
            prompts, "classify", pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens, on_error,
            lora_request=lora_request,
        )  # fmt: skip
        return [ClassificationRequestOutput.from_base(output) for output in outputs]

    @with_params("pooling_params", PoolingParams)
    def encode(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParamsGiven = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequests = None,
        pooling_task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What the model makes of each prompt, as arrays. The other arguments are those of `embed`.

        Args:
            pooling_task: "embed" or "classify", for one row a prompt; "token_embed" or "token_classify", for one row
                a token.
        """
        pooling = self.engine.pooling("encode")
        return pooling.run(
            prompts,
            pooling.task(pooling_task),
            pooling_params,
            use_tqdm,
            tokenization_kwargs,
            truncate_prompt_tokens,
            on_error,
            lora_request=lora_request,
        )

    @with_params("pooling_params", PoolingParams)
    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        lora_request: LoRARequests = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        truncate_prompt_tokens: int | None = None,
        on_error: str = "raise",
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: one with one, one with many, or pairs of two lists.

        A model with one class reads both texts together (a cross-encoder); one that embeds gives the cosine of the
        two embeddings, or with ``PoolerConfig(task="token_embed")`` the sum over the first text's tokens of the best
        match among the second's (MaxSim). The other arguments are those of `embed`.

        Args:
            chat_template: a Jinja template, or its file, that writes both texts into one prompt, from messages of the
                roles "query" and "document"; None: the tokenizer joins them.

        Raises:
            ValidationError: the model does neither, the lists' lengths do not fit, or a text is refused.
        """
        return self.engine.pooling("score").score(
            data_1, data_2, chat_template, pooling_params, use_tqdm, tokenization_kwargs, truncate_prompt_tokens,
            on_error, lora_request=lora_request,
        )  # fmt: skip

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """What the engine can be asked for: "generate", or the tasks of `encode`, and "score"."""
        return self.engine.supported_tasks

    # The engine's state: caches, sleep, weights.

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes. Returns False, and does nothing, while requests run.

        Args:
            reset_running_requests: preempt what runs first; it is computed anew.
            reset_connector: forget the blocks in the host's memory as well (`kv_offloading_size`), which stay
                otherwise: what they hold is as right as it was. Changed weights make the engine forget them by itself.
        """
        return self.engine.reset_prefix_cache(
            reset_running_requests=reset_running_requests, reset_connector=reset_connector
        )

    def reset_mm_cache(self) -> None:
        """Forget the pictures and videos that were prepared lately (`mm_processor_cache_gb`)."""
        self.engine.reset_mm_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the device's memory back, and keep the compiled programs for `wake_up`.

        Args:
            level: 0 only pauses; 1 drops the KV cache and moves the weights to the host's memory (on CPU, where that
                is the same memory, they stay where they are); 2 drops both, and `wake_up` reads the weights anew.
            mode: what happens to requests: "abort" ends them (``finish_reason="abort"``), "wait" runs them to their
                end first, "keep" computes them anew after `wake_up`.

        While the engine sleeps, requests are refused with a RuntimeError.
        """
        self.engine.sleep(level, mode)

    def wake_up(self, tags: Iterable[str] | None = None) -> bool:
        """Undo `sleep`, wholly or (with `tags` among "weights", "kv_cache", "scheduling") in part.

        Returns:
            Whether the engine is awake: nothing sleeps any more.
        """
        return self.engine.wake_up(tags)

    @property
    def is_sleeping(self) -> bool:
        return self.engine.core.is_sleeping

    def release_kv_cache_memory(self) -> None:
        """Drop the KV cache alone; ``wake_up(["kv_cache"])`` makes a new one."""
        self.engine.release_kv_cache_memory()

    def apply_model(self, function: Callable[[Any], Result]) -> list[Result]:
        """What `function` makes of the model's weights, a pytree of `jax.Array`; a list with one result for each copy
        of the model (`data_parallel_size`).
        """
        return self.engine.apply_model(function)

    def update_weights(self, params: Any) -> None:
        """Go on with other weights: a pytree like `apply_model` shows, with the same shapes and dtypes; or a state of
        `flax.nnx`, or the module, that `jaxllm.flax.to_nnx` gave, in any float dtype; or a dict of tensors by Hugging
        Face's names, all of the model's or some, numpy's, JAX's or torch's, in any float dtype: ``model.state_dict()``.

        A pytree's layers are a tuple of segments, each stacked on the first axis of every array: one of all layers, as
        engines on the CPU have them, one of each layer, as engines on a GPU have them, or others. Segments that are not
        the engine's are joined or cut, which takes new arrays.

        The prefix cache, which the old weights made, is dropped. Tensors by name become new arrays, all of which lie on
        the device before the old ones leave it: where a GPU has no room for both, call `release_kv_cache_memory` first
        and ``wake_up(["kv_cache"])`` afterwards, or give some tensors at a time.

        Raises:
            ValidationError: another structure, name, shape or dtype; the text names the first difference. Tensors by
                name where the weights are quantized, or lie in several processes.
            RuntimeError: requests are running.
        """
        self.engine.update_weights(params)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Call something on the runner, which is what vLLM's workers are here; a list with one result for each copy of
        the model (`data_parallel_size`).

        Args:
            method: the name of one of the runner's methods (``"reload_weights"``), or a function of the runner.
            timeout: without effect: the call is made in this thread.

        Raises:
            ValidationError: the runner has no such method.
        """
        return self.engine.call_runner(method, args, kwargs)

    def get_world_size(self, include_dp: bool = True) -> int:
        """Devices that the engine uses.

        Args:
            include_dp: those of all copies of the model; False: of one.
        """
        grid = self.engine.args.grid
        return grid.size if include_dp else grid.stage * grid.tensor

    def explain(self) -> Explanation:
        """Where each array of the engine lies, and what its steps read, compute and exchange; prints as tables, and
        draws the devices in a notebook. `jaxllm.explain` says the same of devices that are not there.

        Raises:
            ValidationError: the engine has no model (``load_format="null"``).
            RuntimeError: the engine has been shut down.
        """
        from jaxllm.planning.explain import explain_engine

        return explain_engine(self.engine)

    def save(self, directory: str | os.PathLike[str], *, format: str = "safetensors") -> None:
        """Save the model with the weights that it has now, as a directory that ``LLM(directory)`` loads.

        The directory appears when all of it is written. One that exists already is left alone, unless it is empty: it
        may be what a program is loading, this one included.

        Args:
            format: "safetensors" writes a Hugging Face directory (weights in the engine's dtype under Hugging Face's
                names, in shards of 5 GB; config, generation config, tokenizer), which transformers and vLLM load, too.
                "orbax" writes the device's arrays as they are, which only jaxllm loads; it needs orbax-checkpoint.

        Raises:
            WeightsError: something is in the directory, there is no room for the weights, or they cannot be written.
            RuntimeError: the engine sleeps, or has been shut down.
        """
        self.engine.save(Path(directory), format=format)

    # What watches it. All of it may be called while another thread drives the engine.

    def get_metrics(self) -> list[Metric]:
        """A snapshot of all counters, gauges and histograms, by vLLM's names.

        They are collected whether or not ``disable_log_stats`` is set: it is about lines in the log alone.
        """
        return self.engine.core.metrics()

    def prometheus_registry(self) -> CollectorRegistry:
        """The metrics for prometheus_client, in a registry of their own: `generate_latest`, `push_to_gateway`, an
        application of yours. Every use of it takes a new snapshot, from any thread.
        """
        return self.engine.watching.prometheus_registry()

    def serve_metrics(self, port: int = 0, address: str = "127.0.0.1") -> MetricsServer:
        """Answer Prometheus on ``http://address:port/metrics`` until the engine ends, or the result is closed.

        Args:
            port: 0 takes a free one; the result's `port` and `url` say which. An earlier call's port is closed.
            address: of the interface to listen on. The default is reached from this machine alone.

        Raises:
            ValidationError: the port is taken, or the address is not this machine's.
        """
        return self.engine.watching.serve_metrics(port, address)

    def trace(self) -> Trace:
        """Record what each step does: ``with llm.trace() as trace: llm.generate(...)``, or `start` and `stop`.

        The trace has the records (`steps`, `requests`), gives them as arrays or a table, draws them and writes them
        for Perfetto. Several may be on at once; while none is, steps cost what they did.
        """
        return self.engine.watching.trace()

    def advise(self, trace: Trace | None = None, *, itl: float | None = None) -> AdviceList:
        """Which argument, at which value, would have helped: preemptions, a queue beside an empty cache, budgets, lost
        prefix hits, drafts, pictures, tokenizing, padding, the host's time. Each piece has what was seen that says so,
        and is gone when an engine with that value meets the same requests.

        Args:
            trace: of this engine, stopped: how it fared meanwhile, with each step's times, and each request's lengths.
                None: what was counted since the engine's start, which says less about steps.
            itl: seconds that may lie between two tokens of a request; None: any number.
        """
        from jaxllm.tuning.advice.advise import advise_engine

        return advise_engine(self.engine, trace, itl=itl)

    def start_profile(self, prefix: str | None = None, *, path: str | os.PathLike[str] | None = None) -> Path:
        """Begin to write a profile with `jax.profiler`: all that host and device do, down to single kernels.

        Args:
            prefix: a folder of this profile's own inside of `path`.
            path: where profiles go; None: the engine's ``profiler_config["torch_profiler_dir"]``, else the folder
                ``profiles`` in jaxllm's cache.

        Returns:
            The folder, which is written when the profile stops.

        Raises:
            ValidationError: this process writes one already.
        """
        return self.engine.watching.start_profile(prefix, path=path)

    def stop_profile(self) -> Path:
        """Write the profile; returns its folder, for ``tensorboard --logdir``. Its trace files open in Perfetto too.

        Raises:
            ValidationError: none was started.
        """
        return self.engine.watching.stop_profile()

    # The engine's life.

    def shutdown(self) -> None:
        """Free everything on the device; the engine cannot be used afterwards. Idempotent."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def start_engine(
    model: str | os.PathLike[str],
    arguments: Mapping[str, Any],
    *,
    cancelled: Callable[[], bool] | None = None,
    in_time: bool = False,
) -> Engine:
    """The engine that the arguments of a face describe. Raises what `LLM` does.

    Args:
        cancelled: asked now and then; where it is True, the start ends with KeyboardInterrupt. None: when the task of
            asyncio that this runs in is cancelled, which is what Ctrl-C does under ``asyncio.run``.
        in_time: requests come whenever they come, not in an order that other processes would know.
    """
    show_log()
    # whoever imports tqdm.auto first in a notebook without ipywidgets is warned: here nobody is
    bar_class()
    args = engine_args(model, **arguments)
    try:
        with StartInterrupt(cancelled or _own_task_is_cancelled()) as interrupt:
            engine = start(args, interrupt, in_time=in_time)
    except BaseException as error:
        clear_frames(error)
        raise
    if args.disable_log_stats is not True:
        engine.generation.notice = Notice(engine).of_call
    return engine


def _own_task_is_cancelled() -> Callable[[], bool]:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # there is no event loop
        task = None
    return lambda: task is not None and task.cancelling() > 0
