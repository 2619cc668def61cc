"""CPU only, eight virtual devices, compiled programs kept; tiers; fixtures that files share."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of what the suite does, so LLVM's optimisations are off.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1",
)
# Programs that were compiled once are read back, by workers and by the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/kvjax/tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


# Folders whose tests need more than this process: `make test` takes the smoke tests of each.
APART = ("process", "browser", "ahead")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Mark what `make test` leaves to `make test-all`: these folders, and what is marked slow."""
    for item in items:
        apart = item.path.parent.name in APART and item.get_closest_marker("smoke") is None
        if apart or item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.rest)


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped():
    """Forget a file's compiled programs after it.

    Each maps several pieces of memory, and Linux gives a process 65,530 (vm.max_map_count): the
    whole suite in one process would reach that, and LLVM then crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked():
    """Calls of wrong types, as users can make them: the tests' own check of types is off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(capsys):
    """Run a `kvjax` command in this process: (exit code, stdout, stderr)."""
    from kvjax.cli import main

    def call(*arguments) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party data beside the repository, or a skip."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data, which a plain clone does not have")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """stories260K converted and loaded: (model, tokenizer, directory)."""
    import kvjax
    from kvjax.models.checkpoints.llama2c import convert_llama2c

    source = shared_data / "stories260K"
    out = tmp_path_factory.mktemp("stories") / "model"
    convert_llama2c(source / "stories260K.bin", source / "tok512.bin", out)
    return *kvjax.load(out, progress=False), out
