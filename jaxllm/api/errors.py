"""The errors that jaxllm raises on purpose."""

from __future__ import annotations


class JaxLLMError(Exception):
    """Everything that jaxllm raises on purpose is one of these."""


class ValidationError(JaxLLMError, ValueError):
    """A value that the caller gave cannot be used; the text names it and says what would work."""


class FetchError(JaxLLMError, RuntimeError):
    """Weights could not be brought onto this machine."""


class ModelNotFoundError(JaxLLMError, FileNotFoundError):
    """The model's file or directory does not exist, or holds no model."""
