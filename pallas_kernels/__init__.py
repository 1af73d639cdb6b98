"""GPU kernels of jaxllm, one folder an operation. Importing this package imports no JAX."""
