"""The PyTorch sides of the benchmarks compute what janus_jax does, with the same weights."""

import jax
import numpy as np
import pytest
import torch
from torch_reference import IMAGE_TOKEN, tiny_pair, uniform

from benchmarks import answer_torch, draw_torch, torch_side
from benchmarks.draw_figures import GUIDANCE_WEIGHT
from benchmarks.models import config
from janus_jax.generation import image, samplers, text
from janus_jax.generation.requests import Requests, make_choice
from janus_jax.interop.load import abstract

IMAGES = 2


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_drawing_gives_the_tokens_of_janus_jax(compiled, monkeypatch):
    """With greedy tokens in place of random ones."""
    theirs, ours = tiny_pair()
    rows = np.random.default_rng(0).integers(1, 90, (2, draw_torch.PROMPT_LENGTH))
    greedy = samplers.make_sampling(0.0, None, None, ours.cfg.gen_vq.codebook_size)
    pair = [(rows[0].tolist(), rows[1].tolist())]
    requests = image.make_requests(pair, IMAGES, 0, GUIDANCE_WEIGHT, greedy, 0)
    ((expected, _),) = image.generate(ours, requests)
    monkeypatch.setattr(torch, "multinomial", lambda probs, num_samples: probs.argmax(-1)[:, None])
    if compiled:
        drawing = draw_torch.CompiledDrawing(theirs, IMAGES, "aot_eager")
    else:
        drawing = draw_torch.Drawing(theirs, IMAGES)
    drawing.tokens = torch.tensor(np.tile(rows, (IMAGES, 1)))
    with torch.no_grad():
        for _ in range(2):  # the second call must not depend on the first
            np.testing.assert_array_equal(drawing(), expected)
    assert len(drawing.step_seconds) == 2 and min(drawing.step_seconds) > 0


@pytest.mark.slow
def test_answers_are_those_of_janus_jax():
    theirs, ours = tiny_pair()
    cfg, number = ours.cfg, 5
    tokens = np.random.default_rng(1).integers(1, 90, (2, 32)).astype(np.int32)
    tokens[:, 3:19] = IMAGE_TOKEN
    pixels = uniform(2, 1, 16, 16, 3, seed=2)
    greedy = samplers.make_sampling(0.0, None, None, cfg.language_model.vocab_size)
    requests = Requests(
        tokens=tokens[:, None],
        lengths=np.full(2, 32, np.int32),
        image_mask=tokens[:, None] == IMAGE_TOKEN,
        pixels=pixels,
        choice=make_choice(np.zeros(2, np.uint32), 0, greedy, eos_id=-1),
    )
    expected = text.generate_tokens(ours, requests, number)
    images = torch.tensor(np.moveaxis(pixels[:, 0], -1, 1).copy())
    marks, answer = answer_torch.generate(theirs, torch.tensor(tokens).long(), images, number)
    assert len(marks) == 1
    np.testing.assert_array_equal(torch.cat(answer, dim=1), expected)
    marks, _ = answer_torch.generate(theirs, torch.tensor(tokens[:1]).long(), images[:1], number)
    assert len(marks) == number and sorted(marks) == marks


def test_the_random_models_have_the_same_parameters():
    cfg = config("tiny")
    own = sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)[1]))
    model = torch_side.random_model(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) == own
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model.model.language_model.rotary_emb.inv_freq).all()
