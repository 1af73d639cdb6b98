"""Attention of a ragged batch of queries over latents in pages: multi-head latent attention, with absorbed queries."""
