"""The helper functions of vLLM's that scripts and other libraries import (`jaxllm.aliases` says by which paths)."""

from __future__ import annotations

import enum
import importlib
import logging
import random
import socket
import sys
import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MiB_bytes = 2**20
GiB_bytes = 2**30


class UsageContext(enum.Enum):
    """Who starts an engine, which vLLM reports; jaxllm reports it to nobody."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    OPENAI_BATCH_RUNNER = "OPENAI_BATCH_RUNNER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class ShardedStateLoader:
    """The names of the files that vLLM's workers save; jaxllm's have Hugging Face's (`LLM.save`), however many devices
    read them.
    """

    TP_ONLY_PATTERN = DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
    PP_AND_TP_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def round_up(x: int, y: int) -> int:
    """The least multiple of `y` that is not below `x`."""
    return cdiv(x, y) * y


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """vLLM's scripts call it between two engines. There is nothing to clean up: `LLM.shutdown` frees everything."""


def destroy_distributed_environment() -> None:
    """As `cleanup_dist_env_and_memory`."""


def destroy_model_parallel() -> None:
    """As `cleanup_dist_env_and_memory`."""


def encode_image_base64(image: Any, **options: Any) -> str:
    """A picture of Pillow's as a file in base64; the options are those of `multimodal.access.encode_image_url`."""
    from jaxllm.multimodal.access import encode_image_url

    return encode_image_url(image, **options).partition(",")[2]


def get_ip() -> str:
    """An address of this machine: the one that it would reach others from, or 127.0.0.1. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def get_open_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def get_tokenizer(
    tokenizer_name: Any,
    *,
    tokenizer_mode: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    download_dir: str | None = None,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """A tokenizer, as the engine reads it: no code of its own is run. The `options` are those of
    ``AutoTokenizer.from_pretrained``.

    Raises what `LLM` does for a model that has none.
    """
    from jaxllm.config.argument import not_built, refuse_unless
    from jaxllm.tokenization.load import load_tokenizer
    from jaxllm.weights.resolve import resolve_tokenizer

    refuse_unless("download_dir", download_dir, (), not_built("this loading option"))
    return load_tokenizer(resolve_tokenizer(tokenizer_name, revision=revision), tokenizer_mode, **options)


def hf_api() -> Any:
    """vLLM's way to the hub: `huggingface_hub.HfApi`."""
    return importlib.import_module("huggingface_hub").HfApi()


def init_logger(name: str) -> logging.Logger:
    """vLLM's way to a logger: `logging.getLogger`."""
    return logging.getLogger(name)


def print_embeddings(embeds: list[float], prefix: str = "Embeddings") -> None:
    """vLLM's examples print embeddings with it: the first four numbers, and how many there are."""
    shown = ", ".join([*map(str, embeds[:4]), *(["..."] if len(embeds) > 4 else [])])
    print(f"{prefix}: [{shown}] (size={len(embeds)})")


def random_uuid() -> str:
    """A name that no other request has."""
    return uuid.uuid4().hex


def resolve_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, tools: list[dict[str, Any]] | None, **_: Any
) -> str | None:
    """The template that conversations are written with: the given one, or the tokenizer's; None where it has none."""
    if chat_template is None and not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template(chat_template, tools=tools)


resolve_hf_chat_template = resolve_chat_template


def set_random_seed(seed: int | None) -> None:
    """Seed Python's, numpy's and, where it is imported, torch's generators. The engine draws from none of them: its
    seed is an argument of `LLM`, and a request's one of `SamplingParams`.
    """
    if seed is None:
        return
    random.seed(seed)
    importlib.import_module("numpy.random").seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
