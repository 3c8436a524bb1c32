"""Set up before jax is imported: float32 matmuls and eight CPU devices for the sharding tests."""

import importlib.util
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

os.environ["JANUS_JAX_COMPILE_CACHE"] = "0"  # tests leave no files in the home directory
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that started them
    programs = tempfile.TemporaryDirectory()  # for tests, and commands that they run, share some
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def _files_with_torch() -> list[str]:
    modules = "torch|transformers|torch_reference|checkpoints"
    pattern = re.compile(rf"^ *(import|from) ({modules})\b", re.MULTILINE)
    files = Path(__file__).parent.glob("test_*.py")
    return [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))]


collect_ignore = [] if importlib.util.find_spec("torch") else _files_with_torch()


def pytest_report_header() -> str | None:
    """Says what is not run where the extra `test` is not installed."""
    if collect_ignore:
        return f"torch is not installed: {len(collect_ignore)} files that compare with it left out"


@pytest.fixture(scope="session", autouse=True)
def processes_without_torch():
    """Processes that tests start find no torch: nothing that users run may need it."""
    own, given = Path(__file__).parent / "without_torch", os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(own), given])))
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """Compiles in less time what then runs slower, for programs of which few steps are run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # other files compare what runs as it does for users


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recordings of the original PyTorch code (see its README)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def pipeline(golden):
    """The golden checkpoint, loaded once for all modules; nothing may change it."""
    from janus_jax import load

    return load(golden / "janus", dtype="float32")


@pytest.fixture(scope="session")
def small(golden):
    """As pipeline, with fewer layers: compiled sooner, for what is compared with no recording."""
    from janus_jax import load

    return load(golden / "janus_small", dtype="float32")
