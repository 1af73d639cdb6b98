"""What adapters of low rank add to a product: every row by the two matrices of its own slot."""
