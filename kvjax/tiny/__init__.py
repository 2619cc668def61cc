"""A small model trained on synthetic long-context tasks, to judge compression offline.

`vocabulary` and `filler` are the language, `tasks` what is asked in it, `batches` sequences to
train on, `settings` and `train` the trainer, `questions` what evaluation asks. See docs/tiny.md.
"""
