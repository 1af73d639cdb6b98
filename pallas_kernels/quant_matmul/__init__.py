"""Products with quantized weights: four bits in groups (AWQ, GPTQ), codebooks, and eight bits."""
