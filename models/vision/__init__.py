"""Vision towers and the models around them: CLIP, LLaVA, Qwen2.5-VL."""
