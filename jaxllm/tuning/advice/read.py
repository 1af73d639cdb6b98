"""How an engine fared, from a file or from a server: a trace that was saved, or metrics as Prometheus gets them."""

from __future__ import annotations

import dataclasses
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.metric import Counter, Gauge, Histogram, Metric, Vector
from jaxllm.engine.observe.engine_settings import EngineSettings
from jaxllm.tuning.advice.load import Load

#: bytes of a scrape, and seconds for it: servers with many models have some megabytes
MOST_BYTES, SECONDS = 64 * 2**20, 30.0
#: vLLM numbers the places of a draft by this label
_POSITION = "position"
#: at the end of a counter's name
_COUNTER = "_total"


def read_metrics(place: str, given: Mapping[str, Any]) -> Load:
    """The load that a scrape tells of.

    Args:
        place: a file, or a URL, which is asked once.
        given: engine arguments, which no scrape has: `max_num_seqs`, `max_num_batched_tokens`, and others.

    Raises:
        ValidationError: the place cannot be read, or has no metrics of vLLM or jaxllm.
    """
    metrics = parse_metrics(_text(place), place)
    names = {metric.name for metric in metrics}
    if not any(name.startswith("vllm:") for name in names):
        raise ValidationError(
            f"{place} has {len(names)} metrics, and none whose name begins with 'vllm:'. A vLLM server has them at "
            "http://HOST:PORT/metrics."
        )
    settings = _settings(metrics, names)
    known = {field.name for field in dataclasses.fields(EngineSettings)}
    changed = {name: value for name, value in given.items() if name in known and value is not None}
    return Load(settings=dataclasses.replace(settings, **changed), metrics=tuple(metrics))


def parse_metrics(text: str, place: str) -> list[Metric]:
    """The metrics of a text in Prometheus' format, under the names that `LLM.get_metrics` has.

    Raises:
        ValidationError: it is none.
    """
    from prometheus_client.parser import text_string_to_metric_families

    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in _counted(family)]
        return [*_histograms(samples), *_others(samples)]
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        reason = str(error) or "a line has no form of it"
        raise ValidationError(f"{place} is not in Prometheus' text format: {reason}") from None


def _counted(family: Any) -> Iterator[Any]:
    """A family's samples, those of counters with the end that tells them: who has kept no types, as Prometheus'
    federation and `grep` do not, has the ends.
    """
    for sample in family.samples:
        if sample.name.endswith("_created"):
            continue  # when it was, which is no metric
        if family.type == "counter" and not sample.name.endswith(_COUNTER):
            sample = sample._replace(name=f"{sample.name}{_COUNTER}")
        yield sample


def _histograms(samples: Iterable[Any]) -> list[Metric]:
    found: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str, Any]] = {}
    for sample in samples:
        name, _, part = sample.name.rpartition("_")
        if part not in ("bucket", "sum", "count") or (part == "bucket") != ("le" in sample.labels):
            continue
        labels = tuple(sorted((key, value) for key, value in sample.labels.items() if key != "le"))
        parts = found.setdefault((name, labels), {"buckets": {}, "sum": 0.0, "count": 0})
        if part == "bucket":
            bound = sample.labels["le"]
            parts["buckets"][bound if bound == "+Inf" else str(float(bound))] = int(sample.value)
        else:
            parts[part] = int(sample.value) if part == "count" else sample.value
    return [Histogram(name, dict(labels), **parts) for (name, labels), parts in found.items() if parts["buckets"]]


def _others(samples: Iterable[Any]) -> Iterator[Metric]:
    """Counters, those of a draft's places together, and gauges."""
    by_place: dict[tuple[str, tuple[tuple[str, str], ...]], dict[int, int]] = {}
    for sample in samples:
        labels, name = dict(sample.labels), sample.name.removesuffix(_COUNTER)
        if name.endswith("_per_pos") and labels.get(_POSITION, "").isdecimal():
            place = int(labels.pop(_POSITION))
            by_place.setdefault((name, tuple(sorted(labels.items()))), {})[place] = int(sample.value)
        elif name != sample.name:
            value = int(sample.value) if float(sample.value).is_integer() else sample.value
            yield Counter(name, labels, value)
        else:
            yield Gauge(name, labels, sample.value)
    for (name, labels), places in by_place.items():
        yield Vector(name, dict(labels), [places.get(place, 0) for place in range(max(places) + 1)])


def _settings(metrics: Iterable[Metric], names: set[str]) -> EngineSettings:
    """What the labels of `vllm:cache_config_info` say; jaxllm's own server is known by its metrics."""
    ours = any(name.startswith("jaxllm:") for name in names)
    info = next((metric for metric in metrics if metric.name == "vllm:cache_config_info"), None)
    labels = {} if info is None else info.labels
    return EngineSettings(
        engine="jaxllm" if ours else "vllm",
        model=next((metric.labels["model_name"] for metric in metrics if "model_name" in metric.labels), ""),
        block_size=_number(labels.get("block_size"), int),
        num_blocks=_number(labels.get("num_gpu_blocks"), int),
        gpu_memory_utilization=_number(labels.get("gpu_memory_utilization"), float),
        sized_by="num_gpu_blocks_override"
        if _number(labels.get("num_gpu_blocks_override"), int)
        else "gpu_memory_utilization",
        enable_prefix_caching=labels.get("enable_prefix_caching") != "False",
    )


def _number(text: str | None, kind: type) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:  # "None"
        return None


def _text(place: str) -> str:
    if not re.match(r"[a-z][a-z0-9+.-]*://", place, re.IGNORECASE):
        try:
            return Path(place).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValidationError(f"{place} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise ValidationError(f"{place} is not a text in UTF-8, as Prometheus' format is.") from None
    if not place.lower().startswith(("http://", "https://")):
        raise ValidationError(f"{place!r} is no URL of http or https. A file is given by its path.")
    try:
        # of a machine's own server, which no proxy knows
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        with opener.open(place, timeout=SECONDS) as answer:
            content = answer.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        hint = " A server's metrics are at /metrics." if not place.rstrip("/").endswith("/metrics") else ""
        raise ValidationError(f"{place} answers {error.code} ({error.reason}).{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValidationError(f"{place} cannot be reached: {reason}. Does a server run there?") from None
    if len(content) > MOST_BYTES:
        raise ValidationError(f"{place} has more than {MOST_BYTES >> 20} MiB of metrics. Save them, and give the file.")
    return content.decode("utf-8", errors="replace")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Nobody is asked but whom the user has named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None
