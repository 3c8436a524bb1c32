"""Accepted configs give the same network as in `transformers` (see config_sweep.py)."""

import collections
import json
import os
import random
import time

import config_sweep
import pytest
import transformers
from config_sweep import ABSENT, Comparison

from janus_jax.families.config import LLAMA_DEFAULTS
from janus_jax.families.registry import read_config

SECONDS = float(os.environ.get("SWEEP_SECONDS", 300))
TEXT_LAYERS = ("text_config", "layer_types")
EQUAL = {
    "as it is": (),
    "heads tied at the top": ((("tie_word_embeddings",), True),),
    "nothing of ties": (
        (("tie_word_embeddings",), ABSENT),
        (("text_config", "tie_word_embeddings"), ABSENT),
    ),
    "swish": ((("text_config", "hidden_act"), "swish"),),
    "layer types": ((TEXT_LAYERS, ["full_attention"] * 2),),
    "older rope key": (
        (("text_config", "rope_scaling"), {"type": "default"}),
        (("text_config", "rope_parameters"), {"rope_type": "default", "rope_theta": 5e4}),
    ),
    "empty rope_scaling": (
        (("text_config", "rope_scaling"), {}),
        (("text_config", "rope_parameters"), {"rope_theta": 5e4}),
    ),
    "rope_theta beside": (
        (("text_config", "rope_parameters"), {"rope_theta": 5e4}),
        (("text_config", "rope_theta"), 7e4),
    ),
}


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Caches the weights of each network."""
    return Comparison(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("name", EQUAL)
def test_configs_that_are_read_mean_the_same(compare, name):
    assert compare(config_sweep.edited(EQUAL[name])) == "equal"


def test_language_config_is_read_as_the_original_s_decoder_does(golden):
    """MultiModalityConfig turns this section into a LlamaConfig, so every key has its meaning."""
    read = 0
    for key, values in config_sweep.TEXT.items():
        for value in values:
            config = json.loads((golden / "janus" / "config.json").read_text())
            config["language_config"] |= {key: value}
            if value is ABSENT:
                del config["language_config"][key]
            try:
                ours = read_config(config).language_model
                theirs = transformers.LlamaConfig(**config["language_config"])
            except Exception:  # one of the two refuses it
                continue
            names = (*LLAMA_DEFAULTS, "num_key_value_heads", "head_dim", "rms_norm_eps")
            for name in names:
                assert getattr(theirs, name) == getattr(ours, name), (key, value)
            rope = theirs.rope_parameters
            assert (rope["rope_type"], rope["rope_theta"]) == ("default", ours.rope_theta)
            assert theirs.hidden_act in ("silu", "swish") and not theirs.tie_word_embeddings
            assert not theirs.attention_bias and not theirs.mlp_bias
            read += 1
    assert read > 100


def sweep(compare, edits, seconds: float = SECONDS) -> collections.Counter:
    """Counts the results (equal, refused, ...); raises for an edit that gives another network.

    The order of the edits is random but the same in each run. Stops after `seconds`.
    """
    counts, ends = collections.Counter(), time.monotonic() + seconds
    for edit in random.Random(0).sample(edits, len(edits)):
        if time.monotonic() > ends:
            break
        try:
            found = compare(config_sweep.edited(edit))
        except Exception as error:
            raise AssertionError(f"{edit}: {error}") from error
        counts[found.split(":")[0]] += 1
    print(f"{counts.total()} of {len(edits)} edits: {dict(counts)}")  # with -rP
    return counts


def test_a_sweep_ends_in_time(compare):
    assert not sweep(compare, [EQUAL["swish"]], seconds=-1)
    assert sweep(compare, [EQUAL["swish"]]) == {"equal": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(config_sweep.single, id="single"),
        pytest.param(config_sweep.rope, id="rope"),
        pytest.param(lambda: config_sweep.pairs(seed=0, number=1000), id="pairs"),
    ],
)
def test_every_edit_is_refused_or_means_the_same(compare, edits):
    counts = sweep(compare, list(edits()))
    assert counts["equal"] > 50 and counts["refused"] > 50
