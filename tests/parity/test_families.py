"""Every family against transformers on torch: tiny random models, saved by transformers, loaded by us, logits compared.

They go through `save_pretrained` and `Checkpoint`, so that the reading of config.json and of weights is compared too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.paged_model import PagedModel

from jaxllm.models import whole_sequences
from jaxllm.models.decoder_config import DecoderConfig
from jaxllm.models.params import Params
from jaxllm.models.registry import model_config
from jaxllm.models.specs import decoder_specs
from jaxllm.weights.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (1, 2, 16, 17, 33, 129, 300)
DECODES = 32
MAX_LEN = max(LENGTHS) + DECODES


@dataclasses.dataclass(frozen=True)
class Family:
    model: str  # transformers' class, without `kind` and Config
    fields: dict[str, Any]
    block_size: int = 16
    config: str | None = None
    max_shard_size: str = "1GB"
    #: tokens of a step
    bucket: int = 320
    kind: str = "ForCausalLM"
    #: of a model of which this is the text
    beside: dict[str, Any] | None = None


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 96,
}
GEMMA3 = {
    "hidden_size": 52,
    "intermediate_size": 90,
    "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "query_pre_attn_scalar": 24,
    "sliding_window": 33,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

#: a model that sees images, whose text is what we compute; the rest is as small as it can be
GEMMA3_IMAGES = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 255,
    "boi_token_index": 254,
    "eoi_token_index": 253,
}

#: in steps that hold the longest prompt
FAMILIES = {
    "llama3": Family(
        "Llama",
        {
            "hidden_size": 66,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 80,
            "rope_parameters": LLAMA3_ROPE,
            "tie_word_embeddings": True,
        },
        block_size=32,
    ),
    "mistral": Family(
        "Mistral",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "sliding_window": 37,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "gemma3": Family("Gemma3", GEMMA3 | {"final_logit_softcapping": 5.0}, config="Gemma3Text"),
}

#: in steps of 64 tokens, which compile and run sooner
IN_SMALL_STEPS = {
    "llama2": Family(
        "Llama",
        {
            "hidden_size": 72,
            "intermediate_size": 101,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
        },
        max_shard_size="60KB",
    ),
    "qwen2": Family(
        "Qwen2",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
        block_size=32,
        max_shard_size="100KB",
    ),
    "qwen2-windows": Family(
        "Qwen2",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "sliding_window": 20,
        },
    ),
    "qwen3": Family(
        "Qwen3",
        {
            "hidden_size": 63,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 96,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "gemma3-images": Family("Gemma3", GEMMA3, config="Gemma3Text", beside=GEMMA3_IMAGES),
    # transformers reads attn_logit_softcapping without using it, so this one is helped
    "gemma3-softcap": Family("Gemma3", GEMMA3 | {"attn_logit_softcapping": 1.5}, block_size=32, config="Gemma3Text"),
    "llama-biases": Family(
        "Llama",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "gemma": Family("Gemma", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": Family(
        "Gemma2",
        {
            "hidden_size": 52,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "query_pre_attn_scalar": 24,
            "sliding_window": 33,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
        block_size=32,
    ),
    "phi3": Family(
        "Phi3",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 37,
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3, 1.6, 1.8, 2.0],
                "long_factor": [2.0, 2.1, 2.3, 2.6, 2.8, 3.0],
            },
        },
    ),
    "granite": Family(
        "Granite",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.8,
        },
    ),
    "opt": Family(
        "OPT",
        # the last position that is computed is the table's last one
        {"hidden_size": 48, "ffn_dim": 100, "num_attention_heads": 4, "max_position_embeddings": MAX_LEN},
    ),
    "gpt2": Family("GPT2", {"hidden_size": 60, "n_inner": 100, "num_attention_heads": 3}, kind="LMHeadModel"),
    "olmo2": Family("Olmo2", {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "smollm3": Family(
        "SmolLM3",
        {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 40,
        },
    ),
    "gpt-neox": Family("GPTNeoX", {"hidden_size": 96, "num_attention_heads": 6}),
    "stablelm-parallel": Family(
        "StableLm",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "cohere": Family(
        "Cohere",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "logit_scale": 0.8,
        },
    ),
    "cohere2": Family(
        "Cohere2",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 33,
            "logit_scale": 0.8,
        },
    ),
    "glm4": Family("Glm4", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
}
IN_LARGE_STEPS = tuple(FAMILIES)
FAMILIES |= {name: dataclasses.replace(family, bucket=64) for name, family in IN_SMALL_STEPS.items()}

#: what sets these apart has nothing to do with pages
VARIANTS = {
    "gpt-neox-one-after-the-other": Family(
        "GPTNeoX",
        {"hidden_size": 48, "num_attention_heads": 3, "use_parallel_residual": False, "attention_bias": False},
    ),
    "stablelm": Family(
        "StableLm", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "use_qkv_bias": True}
    ),
    "starcoder2": Family("Starcoder2", {"hidden_size": 48, "num_attention_heads": 4, "sliding_window": 40}),
    "olmo3": Family(
        "Olmo3",
        {
            "hidden_size": 60,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "sliding_window": 40,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 256,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
            },
        },
    ),
    "exaone4": Family(
        "Exaone4",
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": 40,
        },
    ),
    "exaone4-without-windows": Family(
        "Exaone4",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "seed-oss": Family(
        "SeedOss",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "attention_out_bias": True,
        },
    ),
    "ernie4.5": Family(
        "Ernie4_5",
        {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "use_bias": True},
    ),
    "arcee": Family("Arcee", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "nemotron": Family("Nemotron", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "phi": Family("Phi", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gptj": Family("GPTJ", {"n_embd": 72, "n_inner": 100, "num_attention_heads": 3, "rotary_dim": 14}),
    "falcon": Family("Falcon", {"hidden_size": 72, "num_attention_heads": 3}),
    "falcon-one-after-the-other": Family(
        "Falcon",
        {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "ffn_hidden_size": 100,
        },
    ),
    "falcon-new": Family(
        "Falcon",
        {"hidden_size": 96, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon-new-one-norm": Family(
        "Falcon",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "hunyuan": Family(
        "HunYuanDenseV1",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "apertus": Family(
        "Apertus",
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
        },
    ),
    "glm": Family("Glm", {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}),
}
VARIANTS = {name: dataclasses.replace(family, bucket=64) for name, family in VARIANTS.items()}
#: those that are paged, too, where there is time
PAGED_VARIANTS = ("starcoder2", "olmo3", "exaone4", "ernie4.5", "phi", "gptj", "falcon-new", "hunyuan")


@dataclasses.dataclass(frozen=True)
class Case:
    config: DecoderConfig
    params: Params
    family: Family
    tokens: dict[str, list[int]]  # prompt and continuation
    expected: dict[str, np.ndarray]  # logits at each of them


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    family = {**FAMILIES, **VARIANTS}[request.param]
    model = random_model(family, seed=sum(request.param.encode()))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory, max_shard_size=family.max_shard_size)
    config, params = load(directory, jnp.float32)
    rng = np.random.default_rng(7)
    tokens = {f"{n}": rng.integers(config.vocab_size, size=n + DECODES).tolist() for n in LENGTHS}
    with pytest.MonkeyPatch.context() as patch:
        if family.model == "Gemma3":
            apply_softcap(patch, family.fields.get("attn_logit_softcapping"))
        expected = {name: hf_logits(model, ids) for name, ids in tokens.items()}
    yield Case(config, params, family, tokens, expected)
    jax.clear_caches()


def random_model(family: Family, seed: int) -> Any:
    """Weights that matter: norms and biases are drawn too (transformers starts them at 1 and 0)."""
    config = getattr(transformers, f"{family.config or family.model}Config")(
        **{
            "vocab_size": 257,
            "intermediate_size": 100,
            "num_hidden_layers": 2,
            "max_position_embeddings": 512,
            "pad_token_id": None,
            **family.fields,
        }
    )
    kind = family.kind
    if family.beside is not None:
        kind = "ForConditionalGeneration"
        config = getattr(transformers, f"{family.model}Config")(text_config=config, **family.beside)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family.model}{kind}")(config).eval()
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: Any, scale: float) -> Any:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and name.endswith(".weight"):
                weight.copy_(draw(weight.shape, 0.3) + (0.0 if family.model.startswith("Gemma") else 1.0))
            elif name.endswith(".bias"):
                weight.copy_(draw(weight.shape, 0.5))
            else:
                weight.copy_(draw(weight.shape, weight.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(draw(buffer.shape, 0.3))
    return model


def apply_softcap(patch: pytest.MonkeyPatch, softcap: float | None) -> None:
    if softcap is not None:
        from transformers.models.gemma3 import modeling_gemma3

        capped = functools.partial(modeling_gemma3.eager_attention_forward, softcap=softcap)
        patch.setattr(modeling_gemma3, "eager_attention_forward", capped)


def hf_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def load(directory: Path, dtype: Any) -> tuple[DecoderConfig, Params]:
    checkpoint = Checkpoint(directory)
    config = model_config(checkpoint.config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs, prefix = decoder_specs(config), config.names.prefix
    return config, checkpoint.load(specs, jnp.dtype(dtype), device, prefix=prefix, seed=0, progress=False)


Step = dict[str, list[int]]


def whole_prompts(case: Case) -> Iterator[Step]:
    """Each prompt in one step, alone; then all sequences decode together."""
    for name, ids in case.tokens.items():
        yield {name: ids[: int(name)]}
    for i in range(DECODES):
        yield {name: [ids[int(name) + i]] for name, ids in case.tokens.items()}


def mixed_chunks(case: Case) -> Iterator[Step]:
    """Some sequences in each step, in chunks of 1 to 31: decodes beside prefills, in any order of arrival."""
    rng = np.random.default_rng(3)
    done = dict.fromkeys(case.tokens, 0)
    while left := [name for name, ids in case.tokens.items() if done[name] < len(ids)]:
        step, budget = {}, 64
        for name in rng.permutation(left)[: rng.integers(1, 9)].tolist():
            ids, first = case.tokens[name], done[name]
            chunk = 1 if first >= int(name) else min(int(rng.integers(1, 32)), int(name) - first)
            if chunk <= budget:
                step[name] = ids[first : first + chunk]
                done[name] += chunk
                budget -= chunk
        yield step


@pytest.mark.parametrize(
    "case", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.thorough) for name in PAGED_VARIANTS)], indirect=True
)
def test_logits_equal_transformers(case: Case, record_property):
    compare(case, mixed_chunks, record_property)


@pytest.mark.parametrize("case", IN_LARGE_STEPS, indirect=True)
def test_logits_of_whole_prompts_equal_transformers(case: Case, record_property):
    compare(case, whole_prompts, record_property)


def compare(case: Case, schedule: Callable[[Case], Iterator[Step]], record_property) -> None:
    model = PagedModel(
        case.config, case.params, block_size=case.family.block_size, max_len=MAX_LEN, buckets=(case.family.bucket,)
    )
    got = {name: [] for name in case.tokens}
    for step in schedule(case):
        for name, scores in model.step(step).items():
            got[name].append(scores)
    scores = np.concatenate([part for name in case.tokens for part in got[name]])
    expected = np.concatenate(list(case.expected.values()))
    assert scores.shape == expected.shape and np.isfinite(scores).all()
    worst, spread = float(np.max(np.abs(scores - expected))), float(np.std(expected))
    record_property("max_abs_difference", worst)
    print(f"max abs difference {worst:.1e}, logits' deviation {spread:.2f}")
    assert spread > 0.3, "logits this close together would hide an error"
    assert worst < 1e-4


@pytest.mark.parametrize("case", [*FAMILIES, *VARIANTS], indirect=True)
def test_whole_sequences_equal_transformers(case: Case):
    """The forward pass for training, of two rows; what fills the shorter one up changes nothing before it."""
    long, short = case.tokens["300"], case.tokens["129"]
    rows = np.array([long, short + long[len(short) :]])
    scores = np.asarray(jax.jit(whole_sequences.logits, static_argnums=0)(case.config, case.params, rows))
    for row, name in zip(scores, ("300", "129"), strict=True):
        expected = case.expected[name]
        assert np.abs(row[: len(expected)] - expected).max() < 1e-4


@pytest.mark.parametrize(("name", "cache_dtype"), [("gemma3", jnp.uint16), ("qwen2", jnp.bfloat16)])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name: str, cache_dtype: Any, tmp_path: Path):
    """Both round, at different places: neither is the other's reference, float32 over the same rounded weights is."""
    family = FAMILIES[name]
    random_model(family, seed=11).bfloat16().save_pretrained(tmp_path)
    ids = np.random.default_rng(5).integers(257, size=150).tolist()
    hf = getattr(transformers, f"{family.model}ForCausalLM")
    truth, theirs = (
        hf_logits(hf.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager").eval(), ids)
        for dtype in (torch.float32, torch.bfloat16)
    )
    config, params = load(tmp_path, jnp.bfloat16)
    paged = PagedModel(config, params, block_size=16, max_len=160, buckets=(64,), num_seqs=2, cache_dtype=cache_dtype)
    ends = [1, 2, 64, 101, 140, *range(141, 151)]
    parts = [paged.step({"a": ids[first:end]})["a"] for first, end in zip([0, *ends], ends, strict=False)]
    error, their_error = (float(np.sqrt(np.mean((x - truth) ** 2))) for x in (np.concatenate(parts), theirs))
    print(f"error {error:.4f}, transformers {their_error:.4f}")
    assert error < 1.1 * their_error
