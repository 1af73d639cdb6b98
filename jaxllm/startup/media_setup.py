"""How an engine sees pictures: from the model's files and the arguments to what is planned, and what reads prompts."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit
from jaxllm.models.decoder import DecoderConfig
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.items import IMAGE, VIDEO
from jaxllm.multimodal.prompts import MediaReader
from jaxllm.multimodal.qwen_processor import QwenProcessor
from jaxllm.weights.checkpoint import read_json

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.weights.checkpoint import Checkpoint

logger = logging.getLogger("jaxllm")

#: where checkpoints say how pictures are prepared
_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
#: what config.json says of each modality's token, and Qwen's own
_TOKENS = {IMAGE: ("image_token_id", 151655), VIDEO: ("video_token_id", 151656)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaSetup:
    """Of a model that sees pictures."""

    #: of each modality that is on
    processors: dict[str, QwenProcessor]
    #: modality that is on -> its token
    tokens: dict[str, int]
    limits: dict[str, MediaLimit]
    access: MediaAccess

    @property
    def any_processor(self) -> QwenProcessor:
        """One of them: what is not of sizes is the same in all."""
        return next(iter(self.processors.values()))

    def most_tokens(self, max_model_len: int) -> int:
        """Vectors of the largest item that the arguments allow in so long a context."""
        sizes = []
        for modality in self.tokens:
            limit = self.limits.get(modality, MediaLimit())
            processor = self.processors[modality]
            most = processor.most_tokens
            if limit.width is not None and limit.height is not None:
                most = min(most, processor.tokens_of(limit.width, limit.height))
            sizes.append(most)
        return min(max(sizes), max_model_len)

    def with_limits(self, limits: SchedulerConfig) -> SchedulerConfig:
        """Limits with those of the encoder: of a step, and of what stays on the device."""
        room = max(self.most_tokens(limits.max_model_len), limits.max_num_batched_tokens)
        return dataclasses.replace(limits, encoder_cache_tokens=room, max_encoder_tokens=room)

    def reader(self, max_model_len: int) -> MediaReader:
        """What reads prompts."""
        most = self.most_tokens(max_model_len)
        return MediaReader(
            self.processors, self.tokens, self.limits, max_tokens=most, max_model_len=max_model_len, access=self.access
        )


def read_media(args: EngineArgs, checkpoint: Checkpoint, model: DecoderConfig) -> MediaSetup | None:
    """How a model with a tower sees; None where `limit_mm_per_prompt` switches everything off.

    Raises:
        ValidationError: the model's files contradict each other.
    """
    assert model.vision is not None
    hf = checkpoint.config
    vocabulary = model.vocab_size
    tokens = {modality: hf.get(name, default) for modality, (name, default) in _TOKENS.items()}
    tokens = {m: token for m, token in tokens.items() if args.limit_mm_per_prompt.get(m, MediaLimit()).count}
    for modality, token in tokens.items():
        if not 0 <= token < vocabulary:
            raise ValidationError(
                f"{_TOKENS[modality][0]}={token} of config.json is no token of the {vocabulary} of the model"
            )
    if not tokens:
        return None
    files = {IMAGE: _preprocessor(checkpoint), VIDEO: _video_preprocessor(checkpoint)}
    processors = {
        m: QwenProcessor.of(hf["vision_config"], files[m]).with_options(args.mm_processor_kwargs) for m in tokens
    }
    if len({processor.normal for processor in processors.values()}) > 1:
        raise ValidationError(
            "preprocessor_config.json and video_preprocessor_config.json differ in image_mean or image_std, which one "
            'encoder cannot follow. Take one of them out, or pass limit_mm_per_prompt={"video": 0}.'
        )
    return MediaSetup(
        processors=processors,
        tokens=tokens,
        limits=args.limit_mm_per_prompt,
        access=MediaAccess(args.allowed_local_media_path, args.allowed_media_domains),
    )


def check_media(args: EngineArgs) -> None:
    """Raise ValidationError for what an engine that sees pictures cannot do."""
    remedy = 'Leave it out, or run the text alone with limit_mm_per_prompt={"image": 0, "video": 0}.'
    for asked, what in (
        (args.pipeline_parallel_size > 1, f"pipeline_parallel_size={args.pipeline_parallel_size}"),
        (args.steps_together, "enable_expert_parallel=True with replicas"),
        (args.speculative_config is not None, "speculative_config"),
        (args.enable_prompt_embeds, "enable_prompt_embeds=True"),
        (args.kv_offloading_size, f"kv_offloading_size={args.kv_offloading_size}"),
        (args.cpu_offload_gb, f"cpu_offload_gb={args.cpu_offload_gb:g}"),
        (args.load_format == "null", 'load_format="null"'),
    ):
        if asked:
            raise ValidationError(f"{what} is not available for a model that sees images so far. {remedy}")


def processor_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The files that a model has about how its pictures are prepared, relative to its directory."""
    return tuple(name for name in _FILES if (checkpoint.path / name).is_file())


def _preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    """preprocessor_config.json, or what newer checkpoints have of it in processor_config.json."""
    own = read_json(checkpoint.path / "preprocessor_config.json")
    if own is not None:
        return own
    return (read_json(checkpoint.path / "processor_config.json") or {}).get("image_processor") or {}


def _video_preprocessor(checkpoint: Checkpoint) -> dict[str, Any]:
    """video_preprocessor_config.json or its like; as pictures are, where there is none, as transformers does."""
    own = read_json(checkpoint.path / "video_preprocessor_config.json")
    if own is None:
        own = (read_json(checkpoint.path / "processor_config.json") or {}).get("video_processor")
    return _preprocessor(checkpoint) if own is None else own
