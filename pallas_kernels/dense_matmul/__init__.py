"""Products of rows with a dense weight on a CPU, read where the stack of all layers lies."""
