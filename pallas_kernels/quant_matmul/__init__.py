"""Products with weights of four bits in groups: AWQ, GPTQ."""
