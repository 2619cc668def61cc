"""The built wheel works in an environment of its own."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import kvjax, kvjax.models.decoder, kvjax.kernels.window_scores, importlib.util
print(kvjax.__file__)
print(importlib.util.find_spec("models"), importlib.util.find_spec("kernels"))
"""


def run(*command, **settings):
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.smoke
def test_the_wheel_installs_and_imports(tmp_path):
    wheels, fresh = tmp_path / "wheels", tmp_path / "fresh"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    source = tmp_path / "source"  # a build leaves folders behind: not in the checkout
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", *build, "-w", str(wheels), str(source))
    (wheel,) = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {"kvjax/models/decoder.py", "kvjax/tiny/weights/model.safetensors"} <= set(names)
    assert "kvjax/kernels/window_scores/reference.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kvjax"}

    venv.create(fresh, with_pip=False)
    python = str(fresh / "bin" / "python")
    run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", "--quiet", str(wheel)),
    )
    # The dependencies come from this environment, by path: its editable kvjax does not.
    libraries = str(Path(jax.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": libraries, "JAX_PLATFORMS": "cpu"}
    out = run(python, "-c", PROGRAM, cwd=tmp_path, env=environment).split("\n")
    assert Path(out[0]).is_relative_to(fresh)
    assert out[1] == "None None"
    assert (fresh / "bin" / "kvjax").exists()
