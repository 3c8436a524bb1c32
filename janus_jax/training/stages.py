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
        steps: of the 1B and of the 7B model.
        rows: sequences of 4096 tokens in a step.
        ratio: understanding, text and generation records.
    """

    trained: str
    learning_rate: float
    warmup_steps: int
    steps: dict[str, int]
    rows: int
    ratio: tuple[int, int, int]


ADAPTERS_AND_HEAD = r"(und_aligner|gen_aligner|gen_head|gen_embed)\."
ALL_BUT_ENCODERS = r"(?!und_encoder\.|gen_vq\.)"
ALL_BUT_TOKENIZER = r"(?!gen_vq\.)"

STAGES = {
    1: Stage(ADAPTERS_AND_HEAD, 1e-3, 600, {"1b": 20_000, "7b": 20_000}, 256, (1, 0, 3)),
    2: Stage(ALL_BUT_ENCODERS, 1e-4, 5000, {"1b": 270_000, "7b": 270_000}, 512, (2, 3, 5)),
    3: Stage(ALL_BUT_TOKENIZER, 4e-5, 0, {"1b": 80_000, "7b": 40_000}, 128, (5, 1, 4)),
}


def base_config() -> ConfigDict:
    """The settings of every run, but for init, output and mixture: AdamW as reported, and rows as
    they are reported for the released models."""
    return ConfigDict(
        dict(
            task="stage",
            init="",  # checkpoint folder to go on from
            fresh="",  # parameters that begin anew, a regular expression on their paths
            output="",
            trained=ALL_BUT_TOKENIZER,
            lora_rank=0,  # 0: no LoRA
            lora_alpha=16.0,
            lora_targets=r"language_model\.layers\.\d+\.(self_attn|mlp)\.\w+",
            seed=0,
            steps=1000,
            # data
            mixture={},
            length=4096,
            max_pictures=7,
            max_drawn=7,
            rows=128,
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
            clip=1.0,
            average_decay=0.0,  # 0: no moving average of the weights
            # run
            log_every=10,
            save_every=500,
            keep=3,
            eval_every=0,  # steps; 0: never
            eval_batches=8,
            eval_mixture={},  # of held-out records, as mixture
            sample_every=0,
            prompts=("a red circle left of a blue square",),
            questions=(),  # pairs of a picture's path and a question
            model_dtype="bfloat16",  # of output/model
        )
    )


def stage_config(number: int, size: str, mixture: dict) -> ConfigDict:
    """The settings of a stage of the released models.

    number: 1, 2 or 3. size: "1b" or "7b". mixture: by kind of record, without weights.
    """
    stage = STAGES[number]
    config = base_config()
    weights = dict(zip(KINDS, stage.ratio, strict=True))
    config.update(
        trained=stage.trained,
        steps=stage.steps[size],
        rows=stage.rows,
        learning_rate=stage.learning_rate,
        end_learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
    )
    config.mixture = ConfigDict(
        {kind: dict(weight=weights[kind], **node) for kind, node in mixture.items()}
    )
    return config
