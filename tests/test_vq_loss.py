"""The loss of the image tokenizer against torch's on the same weights, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn.functional import normalize
from torch_reference import assert_close, uniform

from janus_jax.models.vq import VQ, VQConfig
from janus_jax.shapes.vq_loss import COMMITMENT, variance_within, vq_loss

vq_gradients = jax.jit(jax.value_and_grad(vq_loss, has_aux=True))
ALONE = np.arange(18, dtype=np.int32)  # no two patches of the same pixels: no locality loss


class PixelVQ(VQ):
    """A tokenizer of single pixels: everything of VQ but its convolutions."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.cfg = VQConfig(8, 4, ch=8, ch_mult=(1,), num_res_blocks=1, z_channels=5)
        self.encoder = nnx.Linear(3, 5, rngs=rngs)
        self.quant_conv = nnx.Linear(5, 4, rngs=rngs)
        self.codebook = nnx.Param(jax.random.normal(rngs.params(), (8, 4), jnp.float32))
        self.post_quant_conv = nnx.Linear(4, 5, rngs=rngs)
        self.decoder = nnx.Linear(5, 3, rngs=rngs)


class TorchVQ:
    """The same in torch, with autograd's leaves by their names; see VQ-VAE, equation 3."""

    def __init__(self, vq: PixelVQ, pixels: np.ndarray):
        flat = nnx.to_flat_state(nnx.state(vq))
        self.leaves = {".".join(path): torch.tensor(np.array(x[...])) for path, x in flat}
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self.x = torch.tensor(pixels)
        self.z = normalize(self.linear("quant_conv", self.linear("encoder", self.x)), dim=-1)
        codes = normalize(self.leaves["codebook"], dim=-1)
        self.indices = torch.cdist(self.z.detach(), codes.detach()).argmin(-1)
        self.codes = codes[self.indices]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.leaves[f"{name}.kernel"] + self.leaves[f"{name}.bias"]

    def reconstruction_loss(self, z: torch.Tensor) -> torch.Tensor:
        error = self.linear("decoder", self.linear("post_quant_conv", z)) - self.x
        return error.abs().mean() + (error**2).mean()

    def codebook_loss(self) -> torch.Tensor:
        return ((self.z.detach() - self.codes) ** 2).sum(-1).mean()

    def loss(self) -> torch.Tensor:
        commitment = ((self.z - self.codes.detach()) ** 2).sum(-1).mean()
        straight_through = self.z + (self.codes - self.z).detach()
        losses = self.codebook_loss() + COMMITMENT * commitment
        return self.reconstruction_loss(straight_through) + losses

    def gradients(self, loss: torch.Tensor) -> dict[str, np.ndarray]:
        """By name; zeros where there is no way from the loss."""
        names, leaves = zip(*self.leaves.items(), strict=True)
        found = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
        found = [np.zeros(1) if gradient is None else gradient.numpy() for gradient in found]
        shapes = [tuple(leaf.shape) for leaf in leaves]
        return dict(zip(names, map(np.broadcast_to, found, shapes), strict=True))


@pytest.fixture(scope="module")
def vq_pair():
    vq, pixels = PixelVQ(rngs=nnx.Rngs(3)), uniform(2, 3, 3, 3, seed=4)
    return vq, pixels, TorchVQ(vq, pixels)


def assert_gradients(name: str, got: nnx.State, expected: dict[str, np.ndarray]) -> None:
    got = {".".join(path): x[...] for path, x in nnx.to_flat_state(nnx.state(got))}
    assert got.keys() == expected.keys()
    for path, gradient in expected.items():
        assert_close(f"{name}, {path}", got[path], gradient, 1e-6)


def test_vq_loss_and_its_straight_through_gradient_equal_torch(vq_pair):
    vq, pixels, theirs = vq_pair
    (loss, aux), gradients = vq_gradients(vq, pixels, ALONE, jnp.array(True))
    assert_close("VQ loss", loss, theirs.loss(), 1e-6)
    expected = theirs.gradients(theirs.loss())
    assert_gradients("VQ loss", gradients, expected)
    assert np.abs(expected["encoder.kernel"]).max() > 0.01
    assert_close("VQ latents", aux["latents"], theirs.z.reshape(-1, 4), 1e-6)
    np.testing.assert_array_equal(aux["indices"], theirs.indices.reshape(-1))
    assert len(set(aux["indices"].tolist())) > 2


def test_the_codebook_learns_from_its_own_term_alone(vq_pair):
    vq, pixels, theirs = vq_pair
    _, gradients = vq_gradients(vq, pixels, ALONE, jnp.array(True))
    expected = theirs.gradients(theirs.codebook_loss())["codebook"]
    assert_close("codebook term", gradients.codebook[...], expected, 1e-6)
    unused = np.setdiff1d(np.arange(8), theirs.indices)
    assert len(unused) and not gradients.codebook[...][unused].any()


def test_without_quantizing_it_is_an_autoencoder(vq_pair):
    vq, pixels, theirs = vq_pair
    (loss, _), gradients = vq_gradients(vq, pixels, ALONE, jnp.array(False))
    expected = theirs.reconstruction_loss(theirs.z)
    assert_close("autoencoder loss", loss, expected, 1e-6)
    assert_gradients("autoencoder", gradients, theirs.gradients(expected))
    assert not gradients.codebook[...].any()


def test_locality_is_the_part_of_the_variance_within_equal_patches(vq_pair):
    vq, pixels, theirs = vq_pair
    groups = np.repeat(np.int32([0, 3, 7, 9, 17, 4]), 3)
    (loss, aux), gradients = vq_gradients(vq, pixels, groups, jnp.array(False))
    z = theirs.z.reshape(6, 3, 4)
    within = ((z - z.mean(1, keepdim=True)) ** 2).sum(-1).mean()
    locality = within / ((z - z.mean((0, 1))) ** 2).sum(-1).mean()
    assert 0.05 < locality < 1
    assert_close("locality", aux["locality"], locality, 1e-5)
    expected = theirs.reconstruction_loss(theirs.z) + locality
    assert_close("loss with locality", loss, expected, 1e-5)
    expected = theirs.gradients(expected)["encoder.kernel"]
    assert_close("locality, encoder.kernel", gradients.encoder.kernel[...], expected, 1e-5)


def test_variance_within_groups():
    vectors = np.float32([[0, 0], [2, 0], [5, 5], [1, 1], [1, 3]])
    got = variance_within(vectors, np.int32([4, 4, 1, 0, 0]))
    assert_close("variance within", got, np.float32((1 + 1 + 0 + 1 + 1) / 5), 1e-7)
