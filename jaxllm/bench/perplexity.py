"""``jaxllm bench perplexity`` tells how well a model foresees a text, in several forms of its weights and of its KV
cache: what quantizing costs.

Perplexity is exp of the mean negative log-probability of a token, given those before it in its window of the text
(Jelinek et al. 1977). The first token of a window has none before it and does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.bench import report
from jaxllm.bench.datasets import bench_tokenizer
from jaxllm.bench.quantized_forms import WrittenForm, written_forms
from jaxllm.bench.weights_alone import WeightsAlone
from jaxllm.command_options import build_llm, engine_arguments
from jaxllm.quantizing.text import own_text
from jaxllm.tokenization.load import load_tokenizer
from jaxllm.weights.resolve import resolve

#: the weights as the checkpoint has them
AS_THEY_ARE = "none"
#: arguments that --resume goes on with only where they are as they were: all forms have them
_SAME = (
    *("model", "revision", "config", "hf_overrides", "load_format", "dtype", "kv_cache_dtype"),
    *("text", "num_tokens", "context", "weights_alone"),
)
#: arguments that say what weights are read, and how
READ = ("dtype", "quantization", "hf_overrides", "load_format", "revision", "hf_token")
#: windows after which what was found is kept
WINDOWS = 4


def run(arguments: argparse.Namespace) -> int:
    """Measure one form after the other and print each beside the first."""
    text = own_text() if arguments.text is None else arguments.text.read_text()
    results = already_measured(arguments)
    asked = forms(arguments)
    written = {} if arguments.every_form is None else every_form(arguments, text)
    for form in (*asked, *written):
        one = results.setdefault(form, {"windows": []})
        if "perplexity" not in one:

            def keep() -> None:
                report.write(arguments.output_json, arguments, results)

            changes = asked[form] if form in asked else changes_of(written[form].written())
            measure(with_form(arguments, changes), text, one, keep)
        first = results[next(iter(asked))]["windows"][: len(one["windows"])]
        print(
            f"{form:16} perplexity {one['perplexity']:8.3f} ({one['perplexity'] / perplexity_of(first):.3f}), weights "
            f"{one['weight_bytes'] / 2**20:,.0f} MiB, {one['kv_bytes_per_token']:,} bytes of KV cache a token, "
            f"{one['tokens']} tokens",
            flush=True,
        )
    return 0


def measure(arguments: argparse.Namespace, text: str, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """How well one engine foresees a text, put into a result: after every few windows, which `keep` is told of."""
    if arguments.weights_alone:
        return measure_weights(arguments, text, result, keep)
    window = arguments.context
    with build_llm(arguments, max_model_len=window + 1, max_num_seqs=4, enable_prefix_caching=False) as llm:
        windows = windows_of(llm.get_tokenizer(), text, arguments)
        llm.wait_until_ready()
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        result |= {
            "weight_bytes": llm.memory_plan.weight_bytes,
            "kv_bytes_per_token": llm.memory_plan.kv_bytes_per_token,
        }
        for first in range(len(result["windows"]), len(windows), WINDOWS):
            start, busy = time.perf_counter(), time.process_time()
            outputs = llm.generate([{"prompt_token_ids": each} for each in windows[first : first + WINDOWS]], params)
            for output in outputs:
                pairs = zip(output.prompt_token_ids or (), output.prompt_logprobs or (), strict=True)
                found = [entry[token].logprob for token, entry in pairs if entry]
                result["windows"].append([math.fsum(found), len(found)])
            result["seconds"] = result.get("seconds", 0.0) + time.perf_counter() - start
            result["processor_seconds"] = result.get("processor_seconds", 0.0) + time.process_time() - busy
            keep()
    finish(result)
    keep()


def measure_weights(arguments: argparse.Namespace, text: str, result: dict[str, Any], keep: Callable[[], None]) -> None:
    """`measure` of the weights alone."""
    model, given = engine_arguments(arguments)
    if given.get("kv_cache_dtype") is not None:
        raise ValidationError("--weights-alone runs no engine: there is no KV cache to be compared.")
    windows = windows_of(bench_tokenizer(arguments), text, arguments)
    read = {name: given[name] for name in READ if given.get(name) not in (None, "auto")}
    weights = WeightsAlone(model, **{"dtype": "float32", **read})
    result |= {"weight_bytes": weights.weight_bytes, "kv_bytes_per_token": 0}
    for first in range(len(result["windows"]), len(windows), WINDOWS):
        start, busy = time.perf_counter(), time.process_time()
        result["windows"] += weights.scores(windows[first : first + WINDOWS], arguments.context)
        result["seconds"] = result.get("seconds", 0.0) + time.perf_counter() - start
        result["processor_seconds"] = result.get("processor_seconds", 0.0) + time.process_time() - busy
        keep()
    finish(result)
    keep()


def finish(result: dict[str, Any]) -> None:
    """Put in what all windows say together."""
    result |= {"perplexity": perplexity_of(result["windows"]), "tokens": sum(count for _, count in result["windows"])}


def windows_of(tokenizer: Any, text: str, arguments: argparse.Namespace) -> list[list[int]]:
    """The windows of a text that are asked for.

    Raises:
        ValidationError: there is none.
    """
    ids, window = tokens_of(tokenizer, text)[: arguments.num_tokens], arguments.context
    windows = [ids[first : first + window] for first in range(0, len(ids) - 1, window)]
    windows = [each for each in windows if len(each) > 1]
    if not windows:
        raise ValidationError(f"The text has {len(ids)} tokens; two at least are needed.")
    return windows


def perplexity_of(windows: Sequence[Sequence[Any]]) -> float:
    """Of pairs: a window's sum of log-probabilities, and how many these are."""
    sums, counts = zip(*windows, strict=True)
    return math.exp(-math.fsum(sums) / sum(counts))


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that may be longer than the model's context, which is no mistake here."""
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def already_measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """With --resume, the forms that the file of results has already, whole or in part.

    Raises:
        ValidationError: there is no file to be named, or its numbers are of another model or text, of other windows of
            it, or of an engine that computes in another dtype.
    """
    path = arguments.output_json
    if not arguments.resume:
        return {}
    if path is None:
        raise ValidationError("--resume goes on with the file of --output-json, which is not given.")
    if not path.exists():
        return {}
    found, given = json.loads(path.read_text(encoding="utf-8")), report.plain_arguments(arguments)
    for name in _SAME:
        # engine arguments that are not given are not there
        was, asked = found["arguments"].get(name), given.get(name)
        if was != asked:
            raise ValidationError(
                f"{path} was measured with {name} {was!r}, and {asked!r} is asked for: --resume goes on with the same; "
                "name another --output-json."
            )
    return {name: each for name, each in found.items() if isinstance(each, dict) and "windows" in each}


def every_form(arguments: argparse.Namespace, text: str) -> dict[str, WrittenForm]:
    """All forms that can be written of the model; those that look at text see what comes behind the measured."""
    source = resolve(engine_arguments(arguments)[0])
    tokenizer = load_tokenizer(source)
    ids = tokens_of(tokenizer, text)[arguments.num_tokens :]
    return written_forms(source, arguments.every_form, str(tokenizer.decode(ids)))


def changes_of(model: Path) -> dict[str, Any]:
    """What an engine of another model is given; a GGUF file's blocks are what it is measured for."""
    return {"model": str(model), "quantization": "gguf" if model.suffix == ".gguf" else None}


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
        found[path.stem if path.suffix == ".gguf" else path.name] = changes_of(path)
    return found or {engine_arguments(arguments)[1].get("quantization") or AS_THEY_ARE: {}}
