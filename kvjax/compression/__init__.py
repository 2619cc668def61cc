"""Compress a prompt's cache: score every entry, divide the budget, keep the best."""
