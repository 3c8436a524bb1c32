"""The full Janus-Pro-1B: every tensor of the released file by name, shape and type, random values.

The folder is written as DeepSeek published it (pytorch_model.bin, bfloat16, 4.2 GB in a temporary
folder) and loaded in float32: 8.4 GB of memory, and minutes on two cores.
"""

import shutil

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import janus_jax
from benchmarks import synthetic

PARAMETERS = 2_076_636_811  # numbers in the released file that Janus uses
QUESTION = "What is in the picture?"


def path_values(state: nnx.State) -> dict[str, jax.Array]:
    return {".".join(map(str, keys)): leaf[...] for keys, leaf in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = synthetic.write_folder(tmp_path_factory.mktemp("full") / "Janus-Pro-1B", "bin")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pro_1b(folder):
    return janus_jax.load(folder, dtype="float32")


def check_weights(stored: dict[str, torch.Tensor], params: dict[str, jax.Array]) -> None:
    """A few of each kind of layer, bit for bit, laid out by hand."""

    def same(path: str, name: str, layout=lambda x: x):
        want = layout(stored[name].float().numpy())
        assert np.array_equal(np.asarray(params[path]), want), path

    llm, vit = "language_model.model.layers", "vision_model.vision_tower.blocks"
    same("language_model.embed_tokens.embedding", "language_model.model.embed_tokens.weight")
    same("language_model.lm_head.kernel", "language_model.lm_head.weight", np.transpose)
    mlp = "mlp.down_proj"
    same(f"language_model.layers.23.{mlp}.kernel", f"{llm}.23.{mlp}.weight", np.transpose)
    same("language_model.norm.scale", "language_model.model.norm.weight")
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = slice(1024 * i, 1024 * (i + 1))
        path = f"und_encoder.blocks.23.attn.{name}"
        same(f"{path}.kernel", f"{vit}.23.attn.qkv.weight", lambda x, rows=rows: x[rows].T)
        same(f"{path}.bias", f"{vit}.23.attn.qkv.bias", lambda x, rows=rows: x[rows])
    same("und_aligner.layers.1.kernel", "aligner.layers.2.weight", np.transpose)
    same("gen_head.out.kernel", "gen_head.vision_head.weight", np.transpose)
    same("gen_vq.codebook", "gen_vision_model.quantize.embedding.weight")
    conv = "gen_vision_model.decoder.conv_blocks.0.upsample.conv.weight"
    same("gen_vq.decoder.levels.0.upsample.kernel", conv, lambda x: x.transpose(2, 3, 1, 0))


@pytest.mark.slow
def test_every_weight_arrives(folder, pro_1b):
    stored = torch.load(folder / "pytorch_model.bin", mmap=True, weights_only=True)
    assert {n: list(t.shape) for n, t in stored.items()} == synthetic.listing()["tensors"]
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert pro_1b.model.cfg == janus_jax.JanusConfig.janus_pro_1b()
    params = path_values(nnx.state(pro_1b.model))
    assert sum(array.size for array in params.values()) == PARAMETERS
    assert {str(array.dtype) for array in params.values()} == {"float32"}
    check_weights(stored, params)


@pytest.mark.slow
def test_answers_a_question_about_an_image(pro_1b):
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    answers = [pro_1b.answer(QUESTION, images=[image], max_new_tokens=4) for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 0


@pytest.mark.slow
def test_generates_a_whole_image(pro_1b):
    images = pro_1b.generate_images("a red circle left of a blue square", seed=1)
    assert images.pixels.shape == (1, 384, 384, 3) and images.pixels.dtype == np.uint8
    assert images.indices.shape == (1, 576) and images.indices.dtype == np.int32
    assert images.indices.min() >= 0 and images.indices.max() < 16384
    assert len(np.unique(images.indices)) > 100  # drawn at temperature 1, so hardly two are equal
    assert images.pixels.std() > 0
    np.testing.assert_array_equal(images.pixels, pro_1b.decode_indices(images.indices))
