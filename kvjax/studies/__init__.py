"""Scripts behind the tables in `docs/`, and the demo."""
