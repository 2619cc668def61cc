"""Write the results of `kvjax eval` as one page, one text and one table.

    read.py  rows, each once  ->  stats.py, tables.py  numbers  ->  page.py, text.py  files

Every number of the page is in the CSV file too; `text.py` writes the same ones as Markdown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvjax.eval.report.page import fill
from kvjax.eval.report.read import read_results
from kvjax.eval.report.tables import tabulate
from kvjax.eval.report.text import as_csv, as_markdown

__all__ = ["write_report"]

_SCRIPTS = ("base.js", "chart.js", "tables.js", "report.js")


def write_report(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.csv.

    The same results give the same files, byte for byte.

    Args:
      folders: what `kvjax eval` wrote: config.toml and results*.jsonl in each.
      out: a folder, made where it is missing.

    Returns:
      The paths written ("html", "markdown", "csv"), counts of rows ("rows", "failed", "duplicates",
      "half_written") and what they are about ("methods", "tasks", "protocols", "lengths").

    Raises:
      ValueError: no folder, one without results, a damaged line or settings file; names it.
      OSError: a file cannot be read or written.
    """
    results = read_results(folders)
    tables = tabulate(results)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    page = fill(
        "report.html", title="kvjax report", data=tables, styles=("report.css",), scripts=_SCRIPTS
    )
    files = {
        "html": (out / "report.html", page),
        "markdown": (out / "report.md", as_markdown(tables)),
        "csv": (out / "report.csv", as_csv(tables)),
    }
    for path, text in files.values():
        path.write_text(text, encoding="utf-8", newline="\n")
    known = {name: tables[name] for name in ("methods", "tasks", "protocols", "lengths")}
    return {name: str(path) for name, (path, _) in files.items()} | results.counts | known
