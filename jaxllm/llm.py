"""`LLM`: the engine as a library."""

from __future__ import annotations

import atexit
import functools
import json
import os
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.engine_args import EngineArgs, engine_args
from jaxllm.config.files import merged
from jaxllm.config.log import show_log
from jaxllm.engine.client import EngineClient, Mailbox
from jaxllm.engine.core import EngineCore
from jaxllm.engine.observe.progress import bar_class
from jaxllm.methods.beam_search import BeamSearchMethods
from jaxllm.methods.control import ControlMethods
from jaxllm.methods.generation import GenerationMethods
from jaxllm.methods.pooling import PoolingMethods
from jaxllm.methods.queueing import QueueingMethods
from jaxllm.methods.watching import WatchingMethods
from jaxllm.startup import Started, start
from jaxllm.tokenization.pool import TokenizerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.llm_engine import LLMEngine


class LLM(GenerationMethods, PoolingMethods, QueueingMethods, BeamSearchMethods, ControlMethods, WatchingMethods):
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
        show_log()
        # whoever imports tqdm.auto first in a notebook without ipywidgets is warned: here nobody is
        bar_class()
        args: EngineArgs = engine_args(model, **kwargs)
        try:
            started = start(args)
        except BaseException as error:
            # whoever keeps the exception (a notebook does) would keep the arrays in its frames
            traceback.clear_frames(error.__traceback__)
            raise
        self._model = args.model
        self._started: Started = started
        self._client = EngineClient(started.core)
        self._inputs = started.inputs
        self._tokenizer = started.tokenizer
        self._default_params = started.default_params
        self._enqueued = []
        self._mailbox = Mailbox()
        self._pool = TokenizerPool(args.tokenizer_pool_size)
        self.memory_plan = started.memory_plan
        #: seconds of each start-up phase
        self.startup_times: dict[str, float] = started.times
        # Steps that other threads run end before the interpreter does, and no more begin: it ends a thread wherever it
        # is, and in the middle of XLA's code the whole process with it.
        hold = atexit.register(functools.partial(self._client.lock.acquire))
        self._free = weakref.finalize(self, _free, started.core, self._pool, hold)
        # at the interpreter's end everything goes anyway, and half of what shutdown needs is gone already
        self._free.atexit = False
        try:
            self._start_watching(args)
        except BaseException:
            self.shutdown()
            raise

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

    def __repr__(self) -> str:
        plan = self.memory_plan
        return (
            f"LLM({str(self._model)!r}, device={plan.device!r}, max_model_len={plan.max_model_len}, "
            f"max_num_seqs={plan.max_num_seqs}, max_num_batched_tokens={plan.max_num_batched_tokens}, "
            f"kv_cache={plan.num_blocks} blocks of {plan.block_size} tokens)"
        )

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise ValidationError("the engine has no tokenizer (skip_tokenizer_init=True)")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling_params uses: the model's generation_config.json, else vLLM's defaults."""
        return self._default_params.clone()

    # The engine's life.

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
        from jaxllm.weights import saved_model

        started, checkpoint = self._started, self._started.checkpoint
        files = {name: (checkpoint.path / name).read_bytes() for name in started.pooling_files}
        if checkpoint.generation_config:
            files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2).encode()
        with self._client.lock:
            self._client.core.check_awake()
            params = started.runner.params
            if params is None:
                raise RuntimeError("the engine has been shut down; make a new LLM")
            saved_model.save(
                Path(directory),
                params,
                format=format,
                model=started.config.model,
                specs=started.config.specs(),
                config=checkpoint.config,
                files=files,
                tokenizer=self._tokenizer,
            )

    def shutdown(self) -> None:
        """Free everything on the device; the engine cannot be used afterwards. Idempotent."""
        with self._client.lock:
            self._stop_watching()
            self._client.close()
            self._free()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _engine(self) -> EngineCore:
        return self._client.core


def _free(core: EngineCore, pool: TokenizerPool, at_exit: Callable[[], object]) -> None:
    atexit.unregister(at_exit)
    pool.shutdown()
    core.shutdown()
