"""The interface of a model family: the code around the networks loads a family it does not know."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec as P

from janus_jax import sharding
from janus_jax.families import registry
from janus_jax.families.family import (
    ConversionTable,
    Family,
    Layout,
    ParameterGroup,
    ParameterRow,
    ParameterTable,
    Precision,
    Rule,
    Skip,
)
from janus_jax.interop import load
from janus_jax.interop.stored import stored_params
from janus_jax.models.janus import JanusConfig


@dataclasses.dataclass(frozen=True)
class Decoder:
    depth: int
    width: int


@dataclasses.dataclass(frozen=True)
class OtherConfig:
    decoder: Decoder


class Other(nnx.Module):
    """A stack of layers and a codec."""

    def __init__(self, cfg: OtherConfig, *, rngs):
        width = cfg.decoder.width
        layers = (nnx.Linear(width, 4, use_bias=False, rngs=rngs) for _ in range(cfg.decoder.depth))
        self.codec = nnx.Linear(2, width, use_bias=False, rngs=rngs)
        self.layers = nnx.List(layers)


OTHER = Family(
    config_class=OtherConfig,
    build=Other,
    parameter_table=ParameterTable(
        (
            ParameterGroup("codec", None, (ParameterRow("kernel", P()),), Precision.FLOAT32),
            ParameterGroup("layers.{i}", "token", (ParameterRow("kernel", P("fsdp", "tensor")),)),
        )
    ),
    stacks={"layers": "decoder.depth"},
    image_codec="codec",
    layouts={
        "plain": Layout(
            read=lambda config: OtherConfig(Decoder(config["depth"], config["width"])),
            write=lambda cfg, dtype, image_token_id: dict(depth=cfg.decoder.depth, dtype=dtype),
            table=lambda cfg: ConversionTable(
                (
                    Rule("net.{i}.weight", ("layers.{i}.kernel",), "linear"),
                    Rule("vae.weight", ("codec.kernel",), "linear"),
                ),
                (Skip("statistic", "not needed"),),
            ),
        )
    },
    check=lambda cfg: None,
    sizes=lambda cfg: None,
    attention_flops=lambda cfg: (),
    processor=lambda folder, config: f"the processor in {folder.name}",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An opened folder of the family OTHER, with its tensors."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, OTHER))
    for module in (registry, load):
        monkeypatch.setattr(module, "detect_layout", lambda config: (OTHER, "plain"))
    rng = np.random.default_rng(0)
    tensors = {f"net.{i}.weight": rng.normal(size=(4, 8)).astype(np.float32) for i in range(3)}
    tensors |= {"vae.weight": rng.normal(size=(8, 2)).astype(np.float32)}
    tensors |= {"statistic": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(depth=3, width=8)))
    return load.open_folder(tmp_path), tensors


def test_a_family_is_found_by_its_config(folder):
    opened, _ = folder
    assert opened.family is OTHER and opened.cfg == OtherConfig(Decoder(3, 8))
    assert registry.family_of(JanusConfig.janus_tiny()) is not OTHER
    assert opened.processor() == f"the processor in {opened.path.name}"
    assert registry.write_config(opened.cfg, None, "plain") == dict(depth=3, dtype="bfloat16")


def test_another_family_is_loaded_sharded(folder):
    opened, tensors = folder
    place = sharding.sharding_for(sharding.make_mesh(1, 2, 2), OTHER.parameter_table)
    params = load.load_params(opened, jnp.bfloat16, place)
    model = load.build_model(opened.cfg, params)
    for i, layer in enumerate(model.layers):
        kernel = layer.kernel[...]
        expected = jnp.asarray(tensors[f"net.{i}.weight"].T, jnp.bfloat16)
        np.testing.assert_array_equal(kernel, expected)
        assert kernel.sharding.spec == P("fsdp", "tensor")
    assert model.codec.kernel[...].dtype == jnp.float32
    assert stored_params(opened).skipped == {"statistic": "not needed"}


def test_a_component_of_another_family_is_loaded_alone(folder):
    opened, tensors = folder
    codec = load.load_component(opened, OTHER.image_codec)
    assert len(jax.tree.leaves(codec)) == 1
    np.testing.assert_array_equal(codec.kernel[...], tensors["vae.weight"].T)
