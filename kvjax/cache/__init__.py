"""The cache: a prompt's kept entries, the tail of new tokens, and attention to both."""
