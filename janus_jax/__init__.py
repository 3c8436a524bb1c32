"""DeepSeek's Janus and Janus-Pro models in JAX.

>>> import janus_jax
>>> janus = janus_jax.load()
>>> images = janus.generate_images("a red circle left of a blue square", num_images=4)
>>> images.pixels.shape  # uint8
(4, 96, 96, 3)
>>> janus.answer("What is in this image?", images=images.pixels[0])
"""

import importlib

_PUBLIC = {
    "Images": "janus_jax.generation.pipeline",
    "Janus": "janus_jax.models.janus",
    "JanusConfig": "janus_jax.models.janus",
    "Pipeline": "janus_jax.generation.pipeline",
    "load": "janus_jax.generation.pipeline",
    "make_mesh": "janus_jax.sharding",
    "parse_mesh": "janus_jax.sharding",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    """Imports a public name on first use, because importing JAX alone takes a second."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'janus_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
