"""The stages of the released models are those of the report's Table 2."""

import importlib
import re

import pytest

from janus_jax.data.mixture import open_parts
from janus_jax.interop.load import param_shapes
from janus_jax.models.janus import JanusConfig

MODELS = ("janus_1_3b", "janus_pro_1b", "janus_pro_7b")
# learning rate, warm-up, steps of the 1B and 7B, rows, parts that train
TABLE_2 = {
    1: (1e-3, 600, 20_000, 20_000, 256, "gen_aligner gen_embed gen_head und_aligner"),
    2: (
        1e-4,
        5000,
        270_000,
        270_000,
        512,
        "gen_aligner gen_embed gen_head language_model und_aligner",
    ),
    3: (
        4e-5,
        0,
        80_000,
        40_000,
        128,
        "gen_aligner gen_embed gen_head language_model und_aligner und_encoder",
    ),
}
RATIOS = {1: (1, 0, 3), 2: (2, 3, 5), 3: (5, 1, 4)}


def config_of(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("number", TABLE_2)
@pytest.mark.parametrize("model", MODELS)
def test_a_stage_is_the_column_of_table_2(model, number):
    config = config_of(f"{model}_stage{number}")
    rate, warmup, steps, steps_7b, rows, parts = TABLE_2[number]
    assert config.learning_rate == config.end_learning_rate == rate
    assert config.warmup_steps == warmup and config.batch_size == rows
    assert config.steps == (steps_7b if model == "janus_pro_7b" else steps)
    assert (config.b1, config.b2) == (0.9, 0.95)
    assert (config.weight_decay, config.max_grad_norm) == (0.0, 1.0)
    assert config.seq_len == 4096
    paths = param_shapes(JanusConfig.janus_tiny())
    trained = {path.split(".")[0] for path in paths if re.match(config.trained, path)}
    assert trained == set(parts.split())
    assert bool(config.reinit) == (number == 1)
    assert set(config.loss_weights.values()) == {1.0}


@pytest.mark.parametrize("number", RATIOS)
@pytest.mark.parametrize("model", MODELS)
def test_records_come_in_the_reported_ratio(model, number):
    tree = config_of(f"{model}_stage{number}").mixture
    part = open_parts(tree, lambda **leaf: leaf["path"])
    weights = {one.name: one.weight for one in part.parts}
    old = model == "janus_1_3b"
    ratio = (7, 3, 10) if old and number == 3 else RATIOS[number]
    found = tuple(weights.get(kind, 0) for kind in ("understanding", "text", "generation"))
    assert found == ratio
    drawn = next(one for one in part.parts if one.name == "generation")
    if number > 1:
        kinds = {one.name.rpartition("/")[2]: one.weight for one in drawn.parts}
        assert kinds["real"] == kinds["synthetic"] == 1
        assert kinds.get("imagenet", 0) == (4 if old and number == 2 else 0)


def test_each_stage_continues_from_the_one_before():
    for model in MODELS:
        for number in (2, 3):
            before = config_of(f"{model}_stage{number - 1}").output
            assert config_of(f"{model}_stage{number}").init == f"{before}/model"


@pytest.mark.parametrize("name", ["finetune_lora", "finetune_full"])
def test_fine_tuning_begins_with_a_released_checkpoint(name):
    config = config_of(name)
    assert config.init == "checkpoints/Janus-Pro-1B" and not config.reinit
    assert bool(config.lora_rank) == (name == "finetune_lora")
    assert config.batch_size % config.accumulate == 0


@pytest.mark.parametrize("number", TABLE_2)
def test_the_small_stages_train_the_same_parts(number):
    config = config_of(f"janus_tiny_stage{number}")
    assert config.trained == config_of(f"janus_pro_1b_stage{number}").trained
    assert bool(config.reinit) == (number == 1)
