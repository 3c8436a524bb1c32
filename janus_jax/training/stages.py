"""The three stages of Janus: what trains in which, and how (Janus-Pro report, Table 2)."""

import dataclasses

from ml_collections import ConfigDict

from janus_jax.data.records import KINDS


@dataclasses.dataclass(frozen=True)
class Stage:
    """A column of Table 2.

    Attributes:
        trained: what trains, a regular expression on parameter paths.
        learning_rate: constant after the warm-up.
        warmup_steps: in which it rises from 0.
        steps: and those of the 7B model where they are others.
        batch_size: sequences of 4096 tokens in a step.
        ratio: understanding, text and generation records.
    """

    trained: str
    learning_rate: float
    warmup_steps: int
    steps: int
    steps_7b: int
    batch_size: int
    ratio: tuple[int, int, int]


ADAPTERS_AND_HEAD = r"(und_aligner|gen_aligner|gen_head|gen_embed)\."
ALL_BUT_ENCODERS = r"(?!und_encoder\.|gen_vq\.)"
ALL_BUT_TOKENIZER = r"(?!gen_vq\.)"

# The learning rate of stage II was to last for 360,000 steps; training stopped at 270,000.
STAGES = {
    1: Stage(ADAPTERS_AND_HEAD, 1e-3, 600, 20_000, 20_000, 256, (1, 0, 3)),
    2: Stage(ALL_BUT_ENCODERS, 1e-4, 5000, 270_000, 270_000, 512, (2, 3, 5)),
    3: Stage(ALL_BUT_TOKENIZER, 4e-5, 0, 80_000, 40_000, 128, (5, 1, 4)),
}
# What Janus-1.3B is known to have done otherwise: its last stage's ratio, and two thirds of the
# images that it drew in its second stage, which were ImageNet's.
RATIO_OF_1_3B = (7, 3, 10)

FOLDERS = {
    "janus_1_3b": "checkpoints/Janus-1.3B",
    "janus_pro_1b": "checkpoints/Janus-Pro-1B",
    "janus_pro_7b": "checkpoints/Janus-Pro-7B",
}
IMAGENET = dict(format="class_folder", path="data/imagenet_tokens")


def base_config() -> ConfigDict:
    """The settings of every run, but for init, output and mixture: AdamW as reported, and rows as
    they are reported for the released models."""
    return ConfigDict(
        dict(
            task="stage",
            init="",  # checkpoint folder to go on from
            reinit="",  # parameters that begin anew, a regular expression on their paths
            output="",
            trained=ALL_BUT_TOKENIZER,
            lora_rank=0,  # 0: no LoRA
            lora_alpha=16.0,
            lora_targets=r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+",
            seed=0,
            steps=1000,
            # data
            mixture={},
            seq_len=4096,
            max_input_images=7,
            max_generated_images=7,
            batch_size=128,
            streams=8,
            tokenized=True,
            max_bad=0.01,
            threads=4,
            # step
            mesh="",  # as "data=1,fsdp=8,tensor=1"; empty: all devices on fsdp
            dtype="bfloat16",
            remat="dots",
            accumulate=1,
            chunk=512,
            loss_weights=dict.fromkeys(KINDS, 1.0),
            # optimizer
            learning_rate=4e-5,
            end_learning_rate=4e-5,
            warmup_steps=0,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            ema_decay=0.0,  # 0: no moving average of the weights
            # run
            log_every=10,
            save_every=500,
            keep=3,
            eval_every=0,  # steps; 0: never
            eval_batches=8,
            eval_mixture={},  # of held-out records, as mixture
            sample_every=0,
            prompts=("a red circle left of a blue square",),
            questions=(),  # pairs of an image's path and a question
            model_dtype="bfloat16",  # of output/model
        )
    )


def stage_config(name: str, number: int) -> ConfigDict:
    """The settings of stage 1, 2 or 3 of a released model, one of FOLDERS.

    The first begins with a released folder, of which the decoder, SigLIP and the image tokenizer
    are kept and the adapters and the image head made anew; each other one with the model of the
    stage before it. Data are looked for in data/, see `mixture`.
    """
    stage, config = STAGES[number], base_config()
    before = FOLDERS[name] if number == 1 else f"runs/{name}_stage{number - 1}/model"
    config.update(
        init=before,
        reinit=stage.trained if number == 1 else "",
        output=f"runs/{name}_stage{number}",
        trained=stage.trained,
        steps=stage.steps_7b if name.endswith("7b") else stage.steps,
        batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        end_learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
    )
    config.mixture = ConfigDict(mixture(name, number))
    return config


def mixture(name: str, number: int) -> dict[str, dict]:
    """Where a stage's records are looked for, and in which ratio.

    Generation is ImageNet with class names as prompts in stage 1; then real and synthetic images
    with their captions, 1 : 1.
    """
    stage, old = STAGES[number], name == "janus_1_3b"
    ratio = RATIO_OF_1_3B if old and number == 3 else stage.ratio
    understanding, text, generation = map(float, ratio)  # so that flags may give them a half
    folder = f"data/stage{number}"
    asked = dict(weight=understanding, format="jsonl", path=f"{folder}/understanding")
    if number == 1:
        return dict(understanding=asked, generation=dict(weight=generation, **IMAGENET))
    captioned = {
        kind: dict(weight=1.0, format="arrayrecord", path=f"{folder}/{kind}")
        for kind in ("real", "synthetic")
    }
    if old and number == 2:
        captioned["imagenet"] = dict(weight=4.0, **IMAGENET)
    return dict(
        understanding=asked,
        text=dict(weight=text, format="jsonl", path=f"{folder}/text"),
        generation=dict(weight=generation, **captioned),
    )
