"""Configs that are read give the network that `transformers` makes of them (config_sweep.py)."""

import collections

import config_sweep
import pytest
from config_sweep import ABSENT, Comparison

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
    """Weights of each network that was read are made once."""
    return Comparison(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("name", EQUAL)
def test_configs_that_are_read_mean_the_same(compare, name):
    assert compare(config_sweep.edited(EQUAL[name])) == "equal"


def sweep(compare, edits) -> collections.Counter:
    """How many were equal, refused, ...; raises with the edit for another network."""
    counts = collections.Counter()
    for edit in edits:
        try:
            found = compare(config_sweep.edited(edit))
        except Exception as error:
            raise AssertionError(f"{edit}: {error}") from error
        counts[found.split(":")[0]] += 1
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(lambda: config_sweep.single(), id="single"),
        pytest.param(lambda: config_sweep.rope(), id="rope"),
        pytest.param(lambda: config_sweep.pairs(seed=0, number=1000), id="pairs"),
    ],
)
def test_every_edit_is_refused_or_means_the_same(compare, edits):
    counts = sweep(compare, edits())
    assert counts["equal"] > 50 and counts["refused"] > 50
