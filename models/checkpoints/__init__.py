"""Weights on disk: safetensors, Orbax and llama2.c files, read and written."""
