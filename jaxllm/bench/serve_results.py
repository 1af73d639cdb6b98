"""``jaxllm bench serve --save-result`` writes the file that ``vllm bench serve`` writes, under its name and keys."""

from __future__ import annotations

import argparse
import collections
import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.bench import report
from jaxllm.bench.serve_trace import Answer

#: what only belongs to a saved result
_NEEDS_SAVING = ("result_filename", "result_dir", "save_detailed", "metadata", "label", "plot_timeline")


def result_path(arguments: argparse.Namespace) -> Path | None:
    """Return where the result goes; None: nowhere. The folder is made.

    Raises ValidationError where options that need ``--save-result`` have none, or the folder cannot be made.
    """
    if not arguments.save_result:
        for name in _NEEDS_SAVING:
            if getattr(arguments, name):
                raise ValidationError(f"--{name.replace('_', '-')} is about the file of --save-result: give that too.")
        return None
    folder = Path(arguments.result_dir or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValidationError(f"--result-dir {str(folder)!r} cannot be made: {error.strerror or error}") from None
    return folder / (arguments.result_filename or _name(arguments))


def _name(arguments: argparse.Namespace) -> str:
    """Return vLLM's name of the file: label, rate, concurrency, model, time."""
    limit = f"-concurrency{arguments.max_concurrency}" if arguments.max_concurrency else ""
    model = str(arguments.model).rstrip("/").rsplit("/", 1)[-1]
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{arguments.label or arguments.backend}-{arguments.request_rate}qps{limit}-{model}-{now}.json"


def metadata(words: Sequence[str]) -> dict[str, str]:
    """Return what ``--metadata NAME=VALUE ...`` adds to the file."""
    pairs = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not name or not sign:
            raise ValidationError(f"--metadata {word!r} is not NAME=VALUE, such as version=0.3.")
        pairs[name] = value
    return pairs


def save(
    path: Path | None, arguments: argparse.Namespace, results: Mapping[str, Any], answers: Sequence[Answer]
) -> None:
    """Write the file; its keys are vLLM's, and those of `report.write` beside them."""
    rate = arguments.request_rate
    said = {
        "backend": arguments.backend,
        "endpoint_type": arguments.backend,
        "label": arguments.label,
        "model_id": arguments.served_model_name or arguments.model,
        "tokenizer_id": getattr(arguments, "tokenizer", None) or arguments.model,
        "num_prompts": len(answers),
        "request_rate": rate if math.isfinite(rate) else "inf",
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
    }
    detailed = _detailed(answers) if arguments.save_detailed else {}
    report.write(path, arguments, {**metadata(arguments.metadata), **said, **results, **detailed})


def _detailed(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """Return a value a request, in the order of the requests; seconds."""
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [answer.times[0] - answer.sent if answer.times else 0.0 for answer in answers],
        "itls": [[after - before for before, after in itertools.pairwise(answer.times)] for answer in answers],
        "start_times": [answer.sent for answer in answers],
        "errors": [answer.error or "" for answer in answers],
    }


def peaks(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the most tokens of one second, where seconds begin with the first request, and the most requests that were
    under way at a time: vLLM counts those of a whole second, which may come one after another.
    """
    good = [answer for answer in answers if answer.error is None]
    began = min(answer.sent for answer in good)
    tokens: dict[int, float] = collections.defaultdict(float)
    for answer in good:
        for time in answer.times:
            # an output may hold several tokens
            tokens[int(time - began)] += answer.output_tokens / len(answer.times)
    # at the same moment, ends come before beginnings
    changes = sorted([(a.sent, 1) for a in good] + [(a.times[-1], -1) for a in good])
    return {
        "max_output_tokens_per_s": float(max(tokens.values())),
        "max_concurrent_requests": max(itertools.accumulate(change for _, change in changes)),
    }
