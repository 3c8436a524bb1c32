"""The model that ships: decoder and adapters of janus_tiny, the long part.

    python train.py --config=configs/janus_tiny_vq.py
    python train.py --config=configs/janus_tiny_vq_refine.py
    python train.py --config=configs/janus_tiny_encoder.py
    python train.py --config=configs/janus_tiny_decoder.py
    python train.py --config=configs/janus_tiny.py

The last takes two hours on 2 CPU cores. Goes on from runs/janus_tiny_decoder and writes
runs/janus_tiny, in DeepSeek's layout; janus_jax/assets/janus_tiny is a copy of it.
"""

from ml_collections import ConfigDict

from configs import janus_tiny_decoder


def get_config() -> ConfigDict:
    """As janus_tiny_decoder, but longer, and more of what it does not draw yet.

    It answers well by now, and draws single objects: more pictures to draw in a step, fewer to
    answer about, and more captions of several objects.
    """
    config = janus_tiny_decoder.get_config()
    config.update(
        init="runs/janus_tiny_decoder",
        output="runs/janus_tiny",
        embed_codes=False,
        seed=1,
        steps=16000,
        generation_batch_size=64,
        understanding_batch_size=16,
        guidance_weight=1.5,  # chosen by benchmarks/score_scenes.py on prompts of its own
        learning_rate=1.2e-3,
        end_learning_rate=2e-5,
        caption_weights=dict(
            single_object=1, two_object=3, counting=4, colors=2, position=5, color_attr=4
        ),
    )
    return config
