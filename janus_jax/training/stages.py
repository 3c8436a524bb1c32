"""The settings of the three training stages of Janus (Janus-Pro report, Table 2)."""

import dataclasses

from ml_collections import ConfigDict

from janus_jax.data.records import KINDS


@dataclasses.dataclass(frozen=True)
class Stage:
    """A column of Table 2.

    Attributes:
        trained: regular expression on the paths of the trainable parameters.
        learning_rate: constant after the warm-up.
        warmup_steps: number of steps in which the learning rate rises from 0.
        steps: number of steps of the 1B model.
        steps_7b: number of steps of the 7B model.
        batch_size: sequences of 4096 tokens in a batch.
        ratio: ratio of understanding, text and generation records.
    """

    trained: str
    learning_rate: float
    warmup_steps: int
    steps: int
    steps_7b: int
    batch_size: int
    ratio: tuple[int, int, int]


ALIGNERS_AND_HEAD = r"(und_aligner|gen_aligner|gen_head|gen_embed)\."
ALL_BUT_ENCODERS = r"(?!und_encoder\.|gen_vq\.)"
ALL_BUT_VQ = r"(?!gen_vq\.)"

# The learning rate schedule of stage 2 was set to 360,000 steps; training stopped at 270,000.
STAGES = {
    1: Stage(ALIGNERS_AND_HEAD, 1e-3, 600, 20_000, 20_000, 256, (1, 0, 3)),
    2: Stage(ALL_BUT_ENCODERS, 1e-4, 5000, 270_000, 270_000, 512, (2, 3, 5)),
    3: Stage(ALL_BUT_VQ, 4e-5, 0, 80_000, 40_000, 128, (5, 1, 4)),
}
# The known differences of Janus-1.3B: the ratio of stage 3, and in stage 2 two thirds of the images
# to generate are from ImageNet.
RATIO_1_3B = (7, 3, 10)

INITIAL_FOLDERS = {
    "janus_1_3b": "checkpoints/Janus-1.3B",
    "janus_pro_1b": "checkpoints/Janus-Pro-1B",
    "janus_pro_7b": "checkpoints/Janus-Pro-7B",
}
IMAGENET = dict(format="class_folder", path="data/imagenet_tokens")


def base_config() -> ConfigDict:
    """Returns the default settings of a run; init, output and mixture must be set.

    AdamW and the length of the rows are as reported for the released models.
    """
    return ConfigDict(
        dict(
            task="stage",
            init="",  # initial checkpoint folder
            reinit="",  # regular expression on the paths of parameters to initialize at random
            output="",  # folder of the run
            trained=ALL_BUT_VQ,  # regular expression on the paths of trainable parameters
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
            mesh="",  # for example "data=1,fsdp=8,tensor=1"; empty: all devices on fsdp
            dtype="bfloat16",
            remat="dots",
            scan="auto",  # run layers in a loop: on, off; auto: on TPU, if they are mostly frozen
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
            eval_mixture={},  # held-out records, in the format of mixture
            sample_every=0,  # steps; 0: never
            prompts=("a red circle left of a blue square",),
            questions=(),  # pairs (image path, question)
            model_dtype="bfloat16",  # dtype of output/model
        )
    )


def stage_config(name: str, number: int) -> ConfigDict:
    """Returns the settings of a stage of a released model.

    Stage 1 starts from the released checkpoint. It keeps the decoder, SigLIP and the image
    tokenizer, and reinitializes the aligners, the image head and the image embedding. Stages 2 and
    3 start from the model of the previous stage. The data is read from data/, see `mixture`.

    name: a key of INITIAL_FOLDERS. number: 1, 2 or 3.
    """
    stage, config = STAGES[number], base_config()
    previous = f"runs/{name}_stage{number - 1}/model"
    config.update(
        init=INITIAL_FOLDERS[name] if number == 1 else previous,
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
    """Returns the sources of a stage and their ratio.

    In stage 1, generation uses ImageNet with class names as captions. In the later stages it uses
    captioned real and synthetic images, 1 : 1.

    name, number: as for stage_config.
    """
    stage, is_1_3b = STAGES[number], name == "janus_1_3b"
    ratio = RATIO_1_3B if is_1_3b and number == 3 else stage.ratio
    # floats, so that flags can set fractional weights
    understanding, text, generation = map(float, ratio)
    folder = f"data/stage{number}"
    questions = dict(weight=understanding, format="jsonl", path=f"{folder}/understanding")
    if number == 1:
        return dict(understanding=questions, generation=dict(weight=generation, **IMAGENET))
    captioned = {
        kind: dict(weight=1.0, format="arrayrecord", path=f"{folder}/{kind}")
        for kind in ("real", "synthetic")
    }
    if is_1_3b and number == 2:
        captioned["imagenet"] = dict(weight=4.0, **IMAGENET)
    return dict(
        understanding=questions,
        text=dict(weight=text, format="jsonl", path=f"{folder}/text"),
        generation=dict(weight=generation, **captioned),
    )
