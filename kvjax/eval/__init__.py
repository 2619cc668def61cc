"""Evaluation: what a compression costs in quality, beside what it saves."""
