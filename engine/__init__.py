"""Continuous batching over a paged KV cache; token ids in, token ids out."""
