"""Configuration. `PoolerConfig` is here under the name by which vLLM's users import it."""

from jaxllm.config.pooler import PoolerConfig

__all__ = ["PoolerConfig"]
