"""Whether a model generates or pools, and how it pools: by the user's arguments, config.json and the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.pooler import DenseModule, Pooler, PoolerConfig
from jaxllm.config.engine_args import EngineArgs
from jaxllm.models.model import ModelConfig
from jaxllm.models.registry import CLASSIFIER_SUFFIX, POOLING_ARCHITECTURES, is_encoder

#: older `task` -> (runner, convert)
_TASKS = {
    "generate": ("generate", "none"),
    "embed": ("pooling", "embed"),
    "embedding": ("pooling", "embed"),
    "classify": ("pooling", "classify"),
    "score": ("pooling", "auto"),
}
#: torch's activation modules by their class's name
_MODULES = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}


def runner_type(args: EngineArgs, hf: Mapping[str, Any], *, has_pooling_files: bool) -> tuple[str, str]:
    """("generate", "none"), or "pooling" with "embed" or "classify".

    Args:
        has_pooling_files: the model comes with sentence-transformers' files.

    Raises:
        ValidationError: the arguments contradict each other, or the model.
    """
    runner, convert = args.runner, args.convert
    if args.task is not None and args.task != "auto":
        wanted, conversion = _TASKS[args.task]
        for name, value, other in (("runner", runner, wanted), ("convert", convert, conversion)):
            if "auto" not in (value, other) and value != other:
                raise ValidationError(f"task={args.task!r} contradicts {name}={value!r}.")
        runner = wanted
        convert = conversion if convert == "auto" else convert
    if convert in ("embed", "classify") and runner == "generate":
        raise ValidationError(f"convert={convert!r} makes a pooling model; it contradicts runner='generate'.")
    architecture = next(iter(hf.get("architectures") or ()), "")
    classifies = architecture.endswith(CLASSIFIER_SUFFIX)
    generates = architecture not in POOLING_ARCHITECTURES
    if runner == "auto":
        pools = has_pooling_files or not generates or convert in ("embed", "classify") or bool(args.pooler_config)
        runner = "pooling" if pools else "generate"
    if runner == "generate":
        if not generates:
            raise ValidationError(
                f"This model does not support `--runner generate`: {architecture} has no head for it."
            )
        return "generate", "none"
    if convert == "none" and generates:
        raise ValidationError(
            f"{architecture} generates; to pool it set convert='embed' or convert='classify', or leave convert out."
        )
    if convert in ("auto", "none"):
        convert = "classify" if classifies else "embed"
    return "pooling", convert


def make_pooler(
    given: PoolerConfig,
    hf: Mapping[str, Any],
    *,
    convert: str,
    pooling_type: str | None,
    normalize: bool | None,
    dense_modules: tuple[DenseModule, ...] = (),
) -> Pooler:
    """How a model pools.

    Args:
        given: the user's wishes, which come first.
        convert: "embed" or "classify".
        pooling_type, normalize: what the model's sentence-transformers files say; None: nothing.
        dense_modules: what they have embeddings go through.

    Without either, causal models pool their last token and BERT its first (CLS), and embeddings are normalised.
    """
    labels = num_labels(hf) if convert == "classify" else 0
    usual = "CLS" if is_encoder(hf) else "LAST"
    if labels and hf.get("classifier_pooling") == "mean":
        usual = "MEAN"
    use_activation = given.use_activation
    if use_activation is None:
        use_activation = True if labels or normalize is None else normalize
    return Pooler(
        seq_pooling_type=given.seq_pooling_type or pooling_type or usual,
        tok_pooling_type=given.tok_pooling_type or "ALL",
        num_labels=labels,
        dense_modules=() if labels else dense_modules,
        activation=_activation(hf, labels) if labels else "identity",
        logit_mean=0.0 if given.logit_mean is None else given.logit_mean,
        logit_sigma=1.0 if given.logit_sigma is None else given.logit_sigma,
        use_activation=use_activation,
        dimensions=given.dimensions,
        step_tag_id=given.step_tag_id,
        returned_token_ids=None if given.returned_token_ids is None else tuple(given.returned_token_ids),
        task=given.task,
        is_matryoshka=bool(hf.get("is_matryoshka") or hf.get("matryoshka_dimensions")),
        matryoshka_dimensions=tuple(hf.get("matryoshka_dimensions") or ()),
    )


def check_dense_modules(model: ModelConfig, pooler: Pooler) -> None:
    """Raises ValidationError where one takes other vectors than those that come."""
    size = model.hidden_size
    for module in pooler.dense_modules:
        if module.in_features != size:
            raise ValidationError(
                f"in_features of {module.path}/config.json is {module.in_features}, and vectors of {size} numbers come."
            )
        size = module.out_features


def classifier_tokens(hf: Mapping[str, Any]) -> tuple[tuple[str, ...], bool] | None:
    """The tokens whose rows of the last matrix make the head, and whether it is the difference of two; None: it is in
    the weights. vLLM's entries of ``hf_overrides`` say so.

    Raises ValidationError where they do not say how.
    """
    tokens = hf.get("classifier_from_token")
    if not tokens:
        return None
    method = hf.get("method") or ("from_2_way_softmax" if hf.get("is_original_qwen3_reranker") else None)
    if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, str) for token in tokens):
        raise ValidationError(f"classifier_from_token must be a list of tokens, got {tokens!r:.80}.")
    if method not in ("from_2_way_softmax", "no_post_processing"):
        raise ValidationError(
            f"classifier_from_token={tokens} with method={method!r}: add 'method' to hf_overrides, "
            "'from_2_way_softmax' (one class, the second token against the first) or 'no_post_processing' (a class for "
            "each token)."
        )
    if method == "from_2_way_softmax" and len(tokens) != 2:
        raise ValidationError(f"method='from_2_way_softmax' takes two tokens, got classifier_from_token={tokens}.")
    return tuple(tokens), method == "from_2_way_softmax"


def num_labels(hf: Mapping[str, Any]) -> int:
    """Classes of a ForSequenceClassification model; transformers' default is 2."""
    if made := classifier_tokens(hf):
        tokens, difference = made
        return 1 if difference else len(tokens)
    return int(hf.get("num_labels") or len(hf.get("id2label") or ()) or 2)


def _activation(hf: Mapping[str, Any], labels: int) -> str:
    """What makes probabilities of class scores: the function that sentence-transformers noted, else the problem's."""
    noted = (hf.get("sentence_transformers") or {}).get("activation_fn") or hf.get(
        "sbert_ce_default_activation_function"
    )
    if noted:
        name = str(noted).rsplit(".", 1)[-1]
        if name not in _MODULES:
            raise ValidationError(
                f"config.json asks for the activation {noted!r}, which is not supported; supported: "
                f"{', '.join(_MODULES)}."
            )
        return _MODULES[name]
    problem = hf.get("problem_type")
    if problem == "regression":
        return "identity"
    if problem == "multi_label_classification" or labels == 1:
        return "sigmoid"
    return "softmax"
