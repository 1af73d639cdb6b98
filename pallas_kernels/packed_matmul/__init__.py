"""Products of rows with weights that stay packed: int8, four bits in groups, the blocks of GGUF files."""
