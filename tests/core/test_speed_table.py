"""The table of speed beside torch: ratios of the same cells, and dashes where a peer has none."""

from kvjax.studies.speed import table


def test_ratios_stand_beside_the_numbers():
    ours = {"prefill": 1.5, "step": 0.02, "question": 0.1, "peak_bytes": 2_000_000_000}
    theirs = {"prefill": 3.0, "step": 0.04, "question": 0.05, "peak_bytes": 1_000_000_000}
    facts = {"prompt": 4096, "batch": 1, "budget": 512}
    cells = [facts | {"method": name} for name in ("full", "kvzip")]
    lines = table([cell | ours for cell in cells], [cells[0] | theirs]).splitlines()
    assert (
        lines[2] == "| 4,096 | 1 | `full` | 1.50 | 0.50 | 20.0 | 0.50 | 100 | 2.00 | 2.00 | 2.00 |"
    )
    assert lines[3] == "| 4,096 | 1 | `kvzip` | 1.50 | - | 20.0 | - | 100 | - | 2.00 | - |"


def test_other_budgets_are_other_cells():
    facts = {"prompt": 4096, "batch": 1, "method": "snapkv"}
    cell = {"prefill": 1.0, "step": 0.02, "question": 0.1, "peak_bytes": 1_000_000_000}
    lines = table([facts | cell | {"budget": 1024}], [facts | cell | {"budget": 512}]).splitlines()
    assert lines[2].count("| - ") == 4
