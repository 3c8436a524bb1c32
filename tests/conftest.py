"""Shared fixtures, and settings that must precede the import of JAX.

The tests run on eight simulated CPU devices, with matrix products in full float32.
"""

import importlib.util
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

os.environ["JANUS_JAX_COMPILE_CACHE"] = "0"  # tests write no files to the home directory
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it from the main process
    # One cache for all workers and for the commands that tests run, because they share programs.
    compilation_cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compilation_cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


def _files_with_torch() -> list[str]:
    """Returns the names of the test files that import torch, directly or through a helper."""
    modules = "torch|transformers|torch_reference|checkpoints"
    pattern = re.compile(rf"^ *(import|from) ({modules})\b", re.MULTILINE)
    files = Path(__file__).parent.glob("test_*.py")
    return [file.name for file in files if pattern.search(file.read_text(encoding="utf-8"))]


collect_ignore = [] if importlib.util.find_spec("torch") else _files_with_torch()


def pytest_report_header() -> str | None:
    """Reports the number of skipped test files if torch is not installed."""
    if collect_ignore:
        return f"torch is not installed: skipping {len(collect_ignore)} test files that need it"


@pytest.fixture(scope="session", autouse=True)
def processes_without_torch():
    """Prevents processes that tests start from importing torch, which they must not need."""
    blocker, inherited = Path(__file__).parent / "without_torch", os.environ.get("PYTHONPATH")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(blocker), inherited])))
        yield


@pytest.fixture(scope="module")
def quick_compiles():
    """Disables most optimizations, for tests that spend more time compiling than running."""
    jax.clear_caches()  # a test that compares results must not mix programs of both kinds
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # other files must compile with optimizations, as users do


@pytest.fixture(scope="session")
def golden() -> Path:
    """Returns the folder with the recordings of the original PyTorch code (see its README)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def pipeline(golden):
    """Returns the golden checkpoint, loaded once for all test files. Tests must not modify it."""
    from janus_jax import load

    return load(golden / "janus", dtype="float32")


@pytest.fixture(scope="session")
def small(golden):
    """Returns a model with fewer layers than `pipeline`, which compiles faster.

    It is for tests that do not compare with a recording.
    """
    from janus_jax import load

    return load(golden / "janus_small", dtype="float32")
