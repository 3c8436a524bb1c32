"""Stage 1 of janus_tiny: trains the aligners and the image head on a frozen decoder.

    python train.py --config=configs/janus_tiny_stage1.py

Starts from runs/janus_tiny_encoder, which contains the trained image tokenizer and encoder. Stages
1 and 2 read the tokens of the images to be generated from data/janus_tiny; docs/janus_tiny.md has
the commands that compute them.
"""

from importlib.resources import files

from ml_collections import ConfigDict

from janus_jax.training.stages import STAGES, base_config

SCENE = files("janus_jax") / "assets" / "scene.png"

# Relative weights of the kinds of captions; kinds that the model generates well get less.
CAPTIONS = dict(
    single_object=1.0, two_object=3.0, counting=4.0, colors=2.0, position=5.0, color_attr=4.0
)
# Weight of generation relative to Table 2, by stage. A decoder that starts from random weights
# learns to generate images last, so stages 1 and 2 have more of it.
GENERATION_WEIGHTS = {1: 2, 2: 2, 3: 1}
COUNT = 30_000  # scenes of each kind of caption


def tiny_stage(number: int) -> ConfigDict:
    """Returns the settings that the stages of janus_tiny share.

    The trainable parameters, and the ratio of the records apart from GENERATION_WEIGHTS, are those
    of the released models. Rows are short, and the records are scenes generated on the fly.
    """
    stage, config = STAGES[number], base_config()
    config.update(
        output=f"runs/janus_tiny_stage{number}",
        trained=stage.trained,
        seq_len=256,
        max_input_images=2,
        max_generated_images=5,
        batch_size=16,
        streams=2,
        tokenized=False,
        threads=1,
        dtype="float32",
        remat="none",
        chunk=128,
        log_every=50,
        sample_every=1000,
        prompts=("a red circle left of a blue square", "three green triangles"),
        questions=((str(SCENE), "Describe the picture."),),
    )
    understanding, text, generation = map(float, stage.ratio)
    captions = {
        kind: dict(weight=weight, format="scenes", path=f"generation/{kind}", count=COUNT)
        for kind, weight in CAPTIONS.items()
    }
    mixture = dict(
        understanding=dict(
            weight=understanding,
            format="scenes",
            path="understanding",
            count=10 * COUNT,
            relations=0.3,
        ),
        generation=dict(weight=GENERATION_WEIGHTS[number] * generation, **captions),
    )
    if text:
        mixture["text"] = dict(weight=text, format="scenes", path="text", count=10 * COUNT)
    config.mixture = ConfigDict(mixture)
    return config


def read_tokens(config: ConfigDict) -> None:
    """Makes the generation records read image tokens that were computed before the run."""
    config.tokenized = True
    for kind, weight in CAPTIONS.items():
        tokens = dict(weight=weight, format="jsonl", path=f"data/janus_tiny/{kind}")
        config.mixture.generation[kind] = ConfigDict(tokens)


def get_config() -> ConfigDict:
    """Returns settings for a short run: more steps with a frozen, untrained decoder gain little."""
    config = tiny_stage(1)
    read_tokens(config)
    config.update(
        init="runs/janus_tiny_encoder",
        reinit=config.trained,
        steps=300,
        learning_rate=1e-3,
        end_learning_rate=1e-3,
        warmup_steps=50,
    )
    return config
