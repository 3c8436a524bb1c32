"""Compiles with the precision of matrix products that users have; see ../conftest.py."""

import jax
import pytest


@pytest.fixture(autouse=True)
def default_precision():
    with jax.default_matmul_precision("default"):
        yield
