"""Stage 1 of a model like janus_tiny: adapters and image head, on a frozen decoder.

    python train.py --config=configs/janus_tiny_stage1.py

Goes on from runs/janus_tiny_encoder, a finished tokenizer and encoder. This stage and the next one
read the images to be drawn as tokens from data/janus_tiny; docs/janus_tiny.md has the commands
that make them.
"""

from ml_collections import ConfigDict

from janus_jax.training.stages import STAGES, base_config

# captions of each kind, relative to the others: what is drawn best least often
CAPTIONS = dict(
    single_object=1.0, two_object=3.0, counting=4.0, colors=2.0, position=5.0, color_attr=4.0
)
# A decoder that begins with nothing learns to draw last: more often than in Table 2, up to stage 3.
DRAWN_MORE = {1: 2, 2: 2, 3: 1}
COUNT = 30_000  # scenes of a kind


def tiny_stage(number: int) -> ConfigDict:
    """As the released models' stages, in what trains and, but for DRAWN_MORE, in the ratio of the
    records; rows are short, and the records are scenes, drawn as they are asked for."""
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
        questions=(("docs/scene.png", "Describe the picture."),),
    )
    understanding, text, generation = map(float, stage.ratio)
    drawn = {
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
        generation=dict(weight=DRAWN_MORE[number] * generation, **drawn),
    )
    if text:
        mixture["text"] = dict(weight=text, format="scenes", path="text", count=10 * COUNT)
    config.mixture = ConfigDict(mixture)
    return config


def read_tokens(config: ConfigDict) -> None:
    """The same images to be drawn, turned to tokens before."""
    config.tokenized = True
    for kind, weight in CAPTIONS.items():
        tokens = dict(weight=weight, format="jsonl", path=f"data/janus_tiny/{kind}")
        config.mixture.generation[kind] = ConfigDict(tokens)


def get_config() -> ConfigDict:
    """Short: a frozen decoder, here an untrained one, learns little more."""
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
