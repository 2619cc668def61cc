"""Studies whose tables stand in `docs/`, and the demo; each is a script."""
