"""Flax (NNX) decoders: they know the cache, and nothing of compression."""
