"""Losses by kind, every parameter's gradient and three steps of AdamW against torch's."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from stage_configs import small_config
from torch.nn.functional import cross_entropy
from torch_reference import IMAGE_TOKEN, channels_first, tiny_pair

from janus_jax.data.records import KINDS
from janus_jax.data.sources import FORMATS
from janus_jax.interop.load import leaves_by_path, load_params, open_folder
from janus_jax.processing.images import ImageConfig
from janus_jax.sharding import parse_mesh
from janus_jax.training.program import Program, put_rows
from janus_jax.training.row_losses import row_losses
from janus_jax.training.settings import Inputs, no_progress, rows_config

pytestmark = pytest.mark.usefixtures("quick_compiles")

IMAGES = ImageConfig(16, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
LENGTH, DRAWN, TARGETS = 26, 16, (4, 10, 16)  # targets by kind
# Attention does not change when all keys move by one vector: nothing but rounding.
NO_GRADIENT = re.compile(r"und_encoder\..*k_proj\.bias")


@pytest.fixture(scope="module")
def rows():
    """One example of each kind to a row: an image and an answer, a text, a drawn image."""
    rng = np.random.default_rng(0)
    asked = np.concatenate([[1], [IMAGE_TOKEN] * 16, rng.integers(2, 95, 7)])
    said, prompt = rng.integers(2, 95, 11), rng.integers(2, 95, 5)
    lengths = (len(asked), len(said), len(prompt) + DRAWN)
    column = np.arange(LENGTH)
    tokens = np.zeros((3, LENGTH), np.int32)
    for row, own in enumerate((asked, said, prompt)):
        tokens[row, : len(own)] = own
    return dict(
        tokens=tokens,
        segment_ids=np.stack([column < n for n in lengths]).astype(np.int32),
        positions=np.stack([np.where(column < n, column, 0) for n in lengths]).astype(np.int32),
        image_mask=tokens == IMAGE_TOKEN,
        gen_mask=np.stack([column < 0, column < 0, (column >= 5) & (column < 5 + DRAWN)]),
        loss_mask=np.stack(
            [(column >= 20) & (column < 24), (column > 0) & (column < 11), column < 0]
        ),
        kind=np.stack([np.where(column < n, i, 0) for i, n in enumerate(lengths)]).astype(np.int8),
        pixels=rng.integers(0, 256, (3, 1, 16, 16, 3), np.uint8),
        generated=rng.integers(0, 40, (3, 1, DRAWN)).astype(np.int32),
    )


def torch_losses(model, rows) -> dict[str, torch.Tensor]:
    """Summed cross-entropy of each row, each run alone and without padding."""
    asked, said, prompt = (
        torch.tensor(rows["tokens"][row, :length], dtype=torch.long)
        for row, length in enumerate((24, 11, 5))
    )
    pixels = channels_first((rows["pixels"][0].astype(np.float32) / 255 - 0.5) / 0.5)
    answered = model(input_ids=asked[None], pixel_values=pixels).logits[0]
    text = model(input_ids=said[None]).logits[0]
    image = torch.tensor(rows["generated"][2, 0], dtype=torch.long)
    embeds = torch.cat(
        [model.get_input_embeddings()(prompt), model.prepare_embeddings_for_image_generation(image)]
    )
    hidden = model.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
    drawn = model.model.generation_head(hidden[4:-1])
    return dict(
        understanding=cross_entropy(answered[19:23], asked[20:24], reduction="sum"),
        text=cross_entropy(text[:-1], said[1:], reduction="sum"),
        generation=cross_entropy(drawn, image, reduction="sum"),
    )


def converted(model, folder: Path) -> dict[str, np.ndarray]:
    """A torch model's weights by our paths, through our converter."""
    model.save_pretrained(folder)
    return jax.device_get(load_params(open_folder(folder), jnp.float32))


@pytest.fixture(scope="module")
def torch_found(rows, tmp_path_factory):
    """Torch's losses by kind, and the gradients of their sum by our paths."""
    model = copy.deepcopy(tiny_pair()[0]).requires_grad_(True)
    losses = torch_losses(model, rows)
    sum(losses.values()).backward()
    for parameter in model.parameters():  # in the weights' place our converter reads them
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    return losses, converted(model, tmp_path_factory.mktemp("gradients"))


def test_losses_and_gradients_equal_torch_s(rows, torch_found):
    want, gradients = torch_found
    graph, params = nnx.split(tiny_pair()[1])

    @jax.jit
    def gradient(params):
        def total(params):
            found = row_losses(nnx.merge(graph, params), rows, IMAGES, 7)
            return sum(loss for loss, _ in found.values()), found

        return jax.grad(total, has_aux=True)(params)

    mine, found = gradient(params)
    for kind, count in zip(KINDS, TARGETS, strict=True):
        assert found[kind][1] == count
        np.testing.assert_allclose(found[kind][0], want[kind].detach(), rtol=1e-4)
    mine = dict(leaves_by_path(mine))
    assert mine.keys() == gradients.keys()
    moved = [path for path, value in gradients.items() if np.abs(value).max() > 0]
    assert len(moved) > 0.9 * len([path for path in mine if "gen_vq" not in path])
    for path, value in gradients.items():
        scale = np.abs(value).max()
        allowed = 1e-6 if NO_GRADIENT.fullmatch(path) else 1e-4 * scale
        np.testing.assert_allclose(mine[path], value, rtol=0, atol=allowed, err_msg=path)


def stepping(folder: Path) -> Program:
    """A run's program for the checkpoint that torch wrote, which has no tokenizer of text."""
    cfg = small_config(folder / "run", init=str(folder), steps=3, batch_size=3, streams=1, chunk=7)
    # with ten times the rate small differences grow from step to step, with a third of it the last
    # place of a weight is 1e-4 of what it moves
    cfg.update(learning_rate=1e-3, end_learning_rate=1e-3, weight_decay=0.1, tokenized=True)
    source, mesh = open_folder(folder), parse_mesh(cfg.mesh)
    processor = SimpleNamespace(image_config=IMAGES)
    rows, rest = rows_config(cfg, mesh), (None, FORMATS, no_progress)
    return Program(Inputs(cfg, source, processor, source.cfg, mesh, rows, *rest))


def torch_steps(model, rows, cfg) -> list[float]:
    """Trains the model as the config says; the norms of the gradients before clipping."""
    weights = [weight for name, weight in model.named_parameters() if "vqmodel" not in name]
    betas, norms = (cfg.b1, cfg.b2), []
    adamw = torch.optim.AdamW(
        weights, lr=cfg.learning_rate, betas=betas, eps=1e-8, weight_decay=cfg.weight_decay
    )
    for _ in range(cfg.steps):
        adamw.zero_grad()
        (sum(torch_losses(model, rows).values()) / sum(TARGETS)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, cfg.max_grad_norm)))
        adamw.step()
    return norms


def test_three_steps_equal_torch_s_adamw_with_clipping(rows, torch_found, tmp_path):
    """Adam's first step is the gradient's sign: it, and with it all three, makes as much of
    rounding as of a gradient. So entries whose first gradient is less than a thousandth of their
    parameter's largest are left out, unless it is exactly zero (tokens that do not occur)."""
    model = copy.deepcopy(tiny_pair()[0]).requires_grad_(True)
    before = converted(model, tmp_path / "before")
    program = stepping(tmp_path / "before")
    parameters, settings = program.parameters, program.inputs.settings
    state, frozen = program.first_state(parameters.load_trained()), parameters.load_frozen()
    for norm in torch_steps(model, rows, settings):
        assert norm > 1.2 * settings.max_grad_norm  # so it clips
        state, metrics = program.step(state, frozen, put_rows(rows, program.inputs.mesh))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    after, kept = converted(model, tmp_path / "after"), []
    for path, value in state.params.items():
        if NO_GRADIENT.fullmatch(path):
            continue
        size = np.abs(torch_found[1][path])
        keep = (size == 0) | (size >= 1e-3 * size.max())
        ours, theirs = ((x - before[path])[keep] for x in (np.asarray(value), after[path]))
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"{path}: {error:.1e} of the update, {keep.mean():.1%} of the entries")
        assert error < 1e-4, path
        kept.append(keep.ravel())
    assert np.concatenate(kept).mean() > 0.98
