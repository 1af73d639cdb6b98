"""Scripts that run other engines, each in the environment of its own engine: they import nothing of jaxllm."""
