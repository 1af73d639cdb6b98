"""Attention of a ragged batch of queries over keys and values in pages."""
