"""From a call of `generate` to its answer: request, prefill, decode, text."""
