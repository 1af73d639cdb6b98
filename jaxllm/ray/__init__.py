"""Engines on a Ray cluster: a pool of them, and one for `ray.data.Dataset`. Importing this imports no ray."""

from __future__ import annotations

from jaxllm.ray.pool import EnginePool
from jaxllm.ray.processor import BatchEngine, EngineProcessorConfig, Processor, build_processor

__all__ = ["BatchEngine", "EnginePool", "EngineProcessorConfig", "Processor", "build_processor"]
