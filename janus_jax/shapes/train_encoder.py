"""Pretrains the understanding encoder of janus_tiny; the released models start from SigLIP.

The answer to a question has little information about individual patches, so the encoder learns
slowly from answers alone: after 1000 steps, 57 % of the answers were correct. After 1000 steps of
this task, which are faster, all patches were labeled correctly in 98 % of the images.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from janus_jax.models.siglip import Siglip
from janus_jax.processing.images import from_uint8
from janus_jax.shapes.batches import NUM_PATCH_LABELS, labeled_images
from janus_jax.shapes.folders import TrainingFolders, check_counts
from janus_jax.shapes.loop import generated_batches, run_steps
from janus_jax.training.step import (
    TrainState,
    apply_gradients,
    default_promotion,
    first_state,
    make_optimizer,
)


class PatchClassifier(nnx.Module):
    """The encoder with a linear head that classifies which object has its center in each patch.

    float32[B, Y, X, 3] -> logits float32[B, T, NUM_PATCH_LABELS].
    """

    def __init__(self, encoder: Siglip, *, rngs: nnx.Rngs):
        self.encoder = encoder
        self.head = nnx.Linear(encoder.cfg.width, NUM_PATCH_LABELS, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.head(self.encoder(pixels))


def train_encoder(settings) -> None:
    """Trains `und_encoder` and writes a checkpoint folder to `output`, without the head.

    settings: ConfigDict of configs/janus_tiny_encoder.py. `init` is the initial checkpoint folder.
    Raises FileNotFoundError or ValueError if a folder cannot be used or a setting is out of its
    range.
    """
    check_counts(settings, "batch_size")
    optimizer = make_optimizer(settings)
    folders = TrainingFolders.from_settings(settings)
    model = folders.load()
    patch = model.cfg.und_encoder.patch_size
    graph, params = nnx.split(PatchClassifier(model.und_encoder, rngs=nnx.Rngs(settings.seed)))

    def make_batch(rng: np.random.Generator, step: int) -> tuple[np.ndarray, np.ndarray]:
        return labeled_images(rng, settings.batch_size, patch)

    def save(state: TrainState) -> None:
        model.und_encoder = nnx.merge(graph, state.params).encoder
        folders.save(model)

    step_fn = make_encoder_step(graph, optimizer)
    state, batches = first_state(params, optimizer), generated_batches(make_batch, settings)
    run_steps(state, step_fn, batches, settings, save)


def make_encoder_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """Returns the jitted step (state, (images, labels)) -> (state, metrics).

    images, labels: as returned by labeled_images. metrics: loss, and image_accuracy, the fraction
    of images with all patches correct.
    """

    def loss_fn(params: nnx.State, images: jax.Array, labels: jax.Array):
        pixels = from_uint8(images)
        logits = nnx.merge(graph, params)(pixels)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        correct = jnp.all(jnp.argmax(logits, axis=-1) == labels, axis=-1)
        return loss, dict(loss=loss, image_accuracy=jnp.mean(correct))

    @default_promotion()
    def step(state: TrainState, batch: tuple[jax.Array, jax.Array]):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, *batch)
        return apply_gradients(state, grads, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
