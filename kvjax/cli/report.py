"""Run `kvjax report`; slow imports come late."""

import argparse
import json
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `kvjax report`."""
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="DIR",
        help="results of `kvjax eval`; several are put together",
    )
    add(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help="a folder for report.html, report.md and report.csv",
    )
    add("--json", action="store_true", help="print one JSON object: files, counts and names")


def run(arguments: argparse.Namespace) -> None:
    """`kvjax report`."""
    from kvjax.eval.report import write_report

    written = write_report([Path(folder) for folder in arguments.folders], Path(arguments.out))
    if arguments.json:
        print(json.dumps(written))
        return
    print(
        f"{written['html']}: {written['rows']} answers, {written['failed']} failed,"
        f" {len(written['methods'])} methods, {len(written['tasks'])} tasks"
    )
