"""How an engine sees pictures: from the model's files and the arguments to what is planned, and what reads prompts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.config.media import MediaLimit
from jaxllm.models.clip_vision import ClipConfig
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.llava_next import tile_grids
from jaxllm.multimodal.access import MediaAccess
from jaxllm.multimodal.items import IMAGE, VIDEO
from jaxllm.multimodal.marks import GEMMA, LLAVA, QWEN, Marks
from jaxllm.multimodal.processor import Processor
from jaxllm.multimodal.processor_cache import ProcessorCache
from jaxllm.multimodal.prompts import MediaReader
from jaxllm.multimodal.qwen_processor import QwenProcessor
from jaxllm.multimodal.square_processor import SquareProcessor
from jaxllm.multimodal.tile_processor import TileProcessor
from jaxllm.weights.checkpoint import read_json

if TYPE_CHECKING:
    from jaxllm.config.engine_args import EngineArgs
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.weights.checkpoint import Checkpoint

logger = logging.getLogger("jaxllm")

#: where checkpoints say how pictures are prepared
_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What sets a family's prompts and pictures apart."""

    marks: Marks
    #: modality -> its token, and the fields of config.json that may say another
    tokens: dict[str, tuple[int, tuple[str, ...]]]
    #: of pictures of one size, `image_processor_type`
    processor: str = ""


_QWEN = _Family(marks=QWEN, tokens={IMAGE: (151655, ("image_token_id",)), VIDEO: (151656, ("video_token_id",))})
#: either name, of older and newer configs
_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_LLAVA = _Family(marks=LLAVA, tokens={IMAGE: (32000, _IMAGE_FIELDS)}, processor="CLIPImageProcessor")
_LLAVA_NEXT = dataclasses.replace(_LLAVA, processor="LlavaNextImageProcessor")
_FAMILIES = {
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Gemma3ForConditionalGeneration": _Family(
        marks=GEMMA, tokens={IMAGE: (262144, _IMAGE_FIELDS)}, processor="Gemma3ImageProcessor"
    ),
    "LlavaForConditionalGeneration": _LLAVA,
    "LlavaNextForConditionalGeneration": _LLAVA_NEXT,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaSetup:
    """Of a model that sees pictures."""

    #: of each modality that is on
    processors: dict[str, Processor]
    #: modality that is on -> its token
    tokens: dict[str, int]
    limits: dict[str, MediaLimit]
    access: MediaAccess
    marks: Marks
    #: whether tokens have positions of three axes
    has_axes: bool
    #: whether a chunk has all of a picture's tokens that it has any of
    keeps_whole: bool
    #: vectors that a step makes at most; None: as many as it has tokens
    max_encoder_tokens: int | None
    #: of prepared pictures
    cache_bytes: int

    @property
    def any_processor(self) -> Processor:
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
                most = min(most, processor.tokens_within(limit.width, limit.height))
            sizes.append(most)
        return min(max(sizes), max_model_len)

    def with_limits(self, limits: SchedulerConfig) -> SchedulerConfig:
        """Limits with those of the encoder: of a step, and of what stays on the device.

        Raises:
            ValidationError: a picture that may not be cut does not fit into a step.
        """
        most = self.most_tokens(limits.max_model_len)
        budget = max(most, self.max_encoder_tokens or limits.max_num_batched_tokens)
        if self.max_encoder_tokens is not None and self.max_encoder_tokens < most:
            logger.warning(
                "max_num_encoder_input_tokens (%d) is less than the largest image has (%d), which is made whole in one "
                "step; using %d.",
                self.max_encoder_tokens,
                most,
                most,
            )
        limits = dataclasses.replace(
            limits, encoder_cache_tokens=budget, max_encoder_tokens=budget, keeps_media_whole=self.keeps_whole
        )
        if not self.keeps_whole:
            return limits
        if most > limits.max_num_batched_tokens:
            raise ValidationError(
                f"Chunked MM input disabled but max_tokens_per_mm_item ({most}) is larger than max_num_batched_tokens "
                f"({limits.max_num_batched_tokens}): a step computes a picture's tokens together. Set "
                f"max_num_batched_tokens to at least {most}."
            )
        # else one whose tokens get log-probabilities would never be computed
        return dataclasses.replace(limits, max_scored_tokens=max(limits.max_scored_tokens, most))

    def reader(self, max_model_len: int, tokenizer: Any) -> MediaReader:
        """What reads prompts.

        Args:
            tokenizer: None: the engine has none.
        """
        return MediaReader(
            self.processors,
            self.tokens,
            self.limits,
            max_tokens=self.most_tokens(max_model_len),
            max_model_len=max_model_len,
            access=self.access,
            marks=self.marks,
            has_axes=self.has_axes,
            tokenizer=tokenizer,
            cache=ProcessorCache(self.cache_bytes) if self.cache_bytes else None,
        )


def read_media(args: EngineArgs, checkpoint: Checkpoint, model: DecoderConfig) -> MediaSetup | None:
    """How a model with a tower sees; None where `limit_mm_per_prompt` switches everything off.

    Raises:
        ValidationError: the model's files contradict each other.
    """
    assert model.vision is not None
    hf, vision = checkpoint.config, model.vision
    family = _family(hf)
    tokens: dict[str, int] = {}
    for modality in wanted_modalities(args, hf):
        default, names = family.tokens[modality]
        name = next((name for name in names if name in hf), names[0])
        tokens[modality] = token = hf.get(name, default)
        if not 0 <= token < model.vocab_size:
            raise ValidationError(f"{name}={token} of config.json is no token of the {model.vocab_size} of the model")
    if not tokens:
        return None
    processors: dict[str, Processor] = {}
    for modality in tokens:
        own = _preprocessor(checkpoint) if modality == IMAGE else _video_preprocessor(checkpoint)
        if isinstance(vision, ClipConfig):
            made: Processor = _square_processor(own, family, vision)
            if vision.has_newline:
                made = _tile_processor(made, own, hf, vision, args.limit_mm_per_prompt.get(IMAGE, MediaLimit()))
        else:
            made = QwenProcessor.of(hf["vision_config"], own)
        processors[modality] = made.with_options(args.mm_processor_kwargs)
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
        marks=family.marks,
        has_axes=model.rope_sections != (),
        keeps_whole=model.sees_whole_pictures or args.disable_chunked_mm_input,
        max_encoder_tokens=args.max_num_encoder_input_tokens,
        cache_bytes=int(args.mm_processor_cache_gb * 2**30),
    )


def _square_processor(own: Mapping[str, Any], family: _Family, vision: ClipConfig) -> SquareProcessor:
    # of LLaVA-NeXT `do_pad` says something else
    own = {name: value for name, value in own.items() if name != "do_pad" or not vision.has_newline}
    return SquareProcessor.of(
        own,
        "SiglipImageProcessor" if family is _LLAVA and not vision.class_token else family.processor,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        num_tokens=vision.num_vectors(vision.fixed_patches),
    )


def _tile_processor(
    square: SquareProcessor, own: Mapping[str, Any], hf: Mapping[str, Any], vision: ClipConfig, limit: MediaLimit
) -> TileProcessor:
    grids = tile_grids(hf, vision.image_size)
    if own.get("image_grid_pinpoints") is not None and tile_grids(own, vision.image_size) != grids:
        raise ValidationError(
            "image_grid_pinpoints of preprocessor_config.json differ from those of config.json: a picture is put "
            "together as it was cut"
        )
    largest = None if limit.width is None or limit.height is None else (limit.width, limit.height)
    return TileProcessor.of(square, grids, largest)


def wanted_modalities(args: EngineArgs, hf: Mapping[str, Any]) -> tuple[str, ...]:
    """What a model with a tower sees, but for what `limit_mm_per_prompt` switches off."""
    limits = args.limit_mm_per_prompt
    return tuple(modality for modality in _family(hf).tokens if limits.get(modality, MediaLimit()).count)


def _family(hf: Mapping[str, Any]) -> _Family:
    return next(_FAMILIES[name] for name in hf["architectures"] if name in _FAMILIES)


def check_media(args: EngineArgs) -> None:
    """Raise ValidationError for what an engine that sees pictures cannot do."""
    remedy = 'Leave it out, or run the text alone with limit_mm_per_prompt={"image": 0, "video": 0}.'
    for asked, what in (
        (args.steps_together, "enable_expert_parallel=True with replicas"),
        (args.enable_prompt_embeds, "enable_prompt_embeds=True"),
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
