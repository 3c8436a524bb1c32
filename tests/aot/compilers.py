"""Which compilers for devices that are not present are installed."""

import importlib.util

import pytest


def _needs(module: str, extra: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs the extra `{extra}`")


needs_tpu = _needs("libtpu", "compile-tpu")
needs_cuda = _needs("jax_cuda12_plugin", "compile-cuda")
# a device of each platform, as parameters of a test
DEVICES = [pytest.param("v5e", marks=needs_tpu), pytest.param("h100", marks=needs_cuda)]
