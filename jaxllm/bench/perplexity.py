"""``jaxllm bench perplexity`` tells how well a model foresees a text, in several forms of its weights and of its KV
cache: what quantizing costs.

Perplexity is exp of the mean negative log-probability of a token, given those before it in its window of the text
(Jelinek et al. 1977). The first token of a window has none before it and does not count.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench import report
from jaxllm.command_options import build_llm, engine_arguments
from jaxllm.quantizing.text import own_text

#: the weights as the checkpoint has them
AS_THEY_ARE = "none"


def run(arguments: argparse.Namespace) -> int:
    """Measure one form after the other and print each beside the first."""
    text = own_text() if arguments.text is None else arguments.text.read_text()
    window = arguments.context
    results: dict[str, Any] = {}
    for form, changes in forms(arguments).items():
        given = with_form(arguments, changes)
        with build_llm(given, max_model_len=window + 1, max_num_seqs=4, enable_prefix_caching=False) as llm:
            ids = llm.get_tokenizer().encode(text, add_special_tokens=False)[: arguments.num_tokens]
            windows = [ids[first : first + window] for first in range(0, len(ids) - 1, window)]
            windows = [each for each in windows if len(each) > 1]
            if not windows:
                raise ValidationError(f"The text has {len(ids)} tokens; two at least are needed.")
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            start = time.perf_counter()
            outputs = llm.generate([{"prompt_token_ids": each} for each in windows], params)
            seconds = time.perf_counter() - start
            found = [
                entry[token].logprob
                for output in outputs
                for token, entry in zip(output.prompt_token_ids or (), output.prompt_logprobs or (), strict=True)
                if entry
            ]
            results[form] = {
                "perplexity": math.exp(-math.fsum(found) / len(found)),
                "tokens": len(found),
                "seconds": seconds,
                "weight_bytes": llm.memory_plan.weight_bytes,
                "kv_bytes_per_token": llm.memory_plan.kv_bytes_per_token,
            }
        one, first = results[form], next(iter(results.values()))
        print(
            f"{form:16} perplexity {one['perplexity']:8.3f} ({one['perplexity'] / first['perplexity']:.3f}), weights "
            f"{one['weight_bytes'] / 2**20:,.0f} MiB, {one['kv_bytes_per_token']:,} bytes of KV cache a token, "
            f"{one['tokens']} tokens",
            flush=True,
        )
    report.write(arguments.output_json, arguments, results)
    return 0


def with_form(arguments: argparse.Namespace, changes: dict[str, Any]) -> argparse.Namespace:
    """A command line with what a form has in place of its own and of its configuration's."""
    return argparse.Namespace(**{**vars(arguments), **changes})


def forms(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> what is other than asked for, as engine arguments. None is the engine's own default, in place of what a
    configuration says.
    """
    found: dict[str, dict[str, Any]] = {dtype: {"dtype": dtype} for dtype in arguments.sweep_dtype or ()}
    for form in arguments.sweep_quantization or ():
        found[form] = {"quantization": None if form == AS_THEY_ARE else form}
    for form in arguments.sweep_kv_cache_dtype or ():
        found[f"{form} KV cache"] = {"kv_cache_dtype": form}
    for model in arguments.sweep_model or ():
        path = Path(model)
        # a file's blocks are what it is measured for
        own = "gguf" if path.suffix == ".gguf" else None
        found[path.stem if own else path.name] = {"model": model, "quantization": own}
    return found or {engine_arguments(arguments)[1].get("quantization") or AS_THEY_ARE: {}}
