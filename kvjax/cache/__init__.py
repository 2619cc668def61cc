"""What is kept: the prompt's entries in either layout, the tail, attention to both."""
