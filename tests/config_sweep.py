"""Edits of a config.json in transformers' layout, interpreted by transformers and by janus_jax.

janus_jax must refuse an edited config or load the same network as transformers. transformers alone
decides whether the networks are equal: it loads the same weights with the edited config and with
the config that `write_config` writes after reading it, and both must give the same outputs.
"""

import copy
import functools
import itertools
import json
import math
import random
from pathlib import Path

import checkpoints
import numpy as np
import safetensors.torch
import torch
import transformers

from janus_jax.families.family import TRANSFORMERS
from janus_jax.families.registry import read_config, write_config
from janus_jax.interop.load import param_shapes, table_for
from janus_jax.interop.rules import export_steps, torch_shape
from janus_jax.models.janus import JanusConfig

ABSENT = object()
IMAGE_TOKEN = 387


def base_config() -> dict:
    """A config smaller than the golden checkpoint's, which loads quickly."""
    config = copy.deepcopy(checkpoints.TRANSFORMERS_CONFIG)
    config["text_config"] |= {"num_hidden_layers": 2, "num_key_value_heads": 2}
    vision = {"num_hidden_layers": 1, "image_size": 4, "patch_size": 2, "num_image_tokens": 4}
    config["vision_config"] |= vision
    config["vq_config"] |= {"num_res_blocks": 1, "channel_multiplier": [2, 1]}
    return config


ROPES = (
    ABSENT, None, {}, [], "x", {"rope_type": "default"}, {"type": "default"}, {"rope_theta": 5e4},
    {"rope_type": "default", "rope_theta": 6e4}, {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 5e4}, {"rope_type": None}, {"factor": 2.0},
    {"type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "default", "type": "linear", "factor": 2.0}, {"rope_theta": 10**10},
    {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
)  # fmt: skip
SIZES = (ABSENT, None, 0, 1, 2, 3, 4, 8, 16, 24, 32, 48, 96, 2.0, "4", True, [4], -1)
FLAGS = (ABSENT, None, True, False, 0, 1, "false")
RATES = (ABSENT, None, 0.0, 0, 0.1, 1, "x")
ACTIVATIONS = (
    ABSENT, None, "gelu", "silu", "swish", "relu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu",
    "gelu_python", "gelu_fast", "SiLU", 1,
)  # fmt: skip
NUMBERS = (ABSENT, None, 1e-6, 1e-5, 1e-3, 1, 0, -1e-6, 1e-300, 1e300, 10**10, 10**400, "x", True)
IDS = (ABSENT, None, 0, 7, 387, 10**6)
TEXT = {
    "hidden_size": SIZES, "intermediate_size": SIZES, "num_hidden_layers": SIZES,
    "num_attention_heads": SIZES, "num_key_value_heads": SIZES, "head_dim": SIZES,
    "max_position_embeddings": (ABSENT, None, 4, 64, 2048, "x"), "vocab_size": (ABSENT, None, 448),
    "hidden_act": ACTIVATIONS, "rms_norm_eps": NUMBERS, "attention_bias": FLAGS, "mlp_bias": FLAGS,
    "tie_word_embeddings": FLAGS, "is_causal": FLAGS, "attention_dropout": RATES,
    "rope_theta": (ABSENT, None, 1e4, 5e4, 10**10, 1e-300, 0, "x"), "rope_parameters": ROPES,
    "rope_scaling": ROPES, "partial_rotary_factor": (ABSENT, None, 0.5, 1.0),
    "model_type": (ABSENT, None, "llama", "mistral", "qwen2", "nothing"),
    "sliding_window": (ABSENT, None, 0, 2, 4096), "attention_chunk_size": (ABSENT, None, 2),
    "layer_types": (
        ABSENT, None, [], ["full_attention"] * 2, ["sliding_attention"] * 2, ["attention"] * 2,
        ["full_attention", "sliding_attention"], ["full_attention"], "full_attention",
    ),
    "per_layer_config": (ABSENT, None, {}, {"0": {"intermediate_size": 64}}, {"1": {}}),
    "pretraining_tp": (ABSENT, None, 1, 2), "use_cache": FLAGS, "pad_token_id": IDS,
    "bos_token_id": IDS, "torch_dtype": (ABSENT, None, "float16", "float32"), "embed_dim": SIZES,
    "dtype": (ABSENT, None, "float16"), "hidden_dropout": RATES, "initializer_range": RATES,
    "num_heads": SIZES, "layer_norm_eps": NUMBERS, "logit_scale": (2.0,), "scale_embedding": FLAGS,
    "num_kv_shared_layers": (ABSENT, None, 0, 1), "kv_sharing_modes": (None, ["own", "shared"]),
    "chunk_size_feed_forward": (0, 2), "original_max_position_embeddings": (None, 64),
    "attn_implementation": (None, "eager"), "output_attentions": (False, True),
}  # fmt: skip
VISION = {
    "hidden_size": SIZES, "num_hidden_layers": SIZES, "num_attention_heads": SIZES,
    "num_channels": SIZES, "image_size": (*SIZES, 6, [4, 4]), "patch_size": (*SIZES, [2, 2]),
    "hidden_act": ACTIVATIONS, "layer_norm_eps": NUMBERS, "attention_dropout": RATES,
    "mlp_ratio": (ABSENT, None, 4, 4.0, 2.5, 0, -1, "4", [4], 1e300, 10**400, True),
    "attention_bias": FLAGS, "hidden_dropout_rate": RATES, "projection_dim": SIZES,
    "projection_dropout": RATES, "use_qk_norm": FLAGS, "depth": SIZES,
    "num_image_tokens": (*SIZES, 576), "model_type": (ABSENT, None, "siglip"),
    "intermediate_size": SIZES, "head_dim": SIZES, "num_key_value_heads": SIZES,
    "rope_parameters": (None, {"rope_type": "linear", "factor": 2.0}), "is_causal": FLAGS,
    "select_layer": (-2,), "per_layer_config": (None, {"0": {"hidden_size": 8}}),
}  # fmt: skip
VQ = {
    "embed_dim": SIZES, "num_embeddings": SIZES, "double_latent": FLAGS, "latent_channels": SIZES,
    "in_channels": SIZES, "base_channels": SIZES,
    "channel_multiplier": (
        ABSENT, None, [], [1, 1], [1, 2], [2, 1, 1], [1], "21", [1.0] * 2, 2, [0, 1], [True, 1]
    ),
    "num_res_blocks": SIZES, "dropout": RATES, "num_patches": SIZES, "out_channels": SIZES,
    "projection_dim": SIZES, "num_hidden_layers": SIZES, "hidden_act": ACTIVATIONS,
    "image_token_embed_dim": SIZES, "norm_num_groups": SIZES, "beta": RATES, "z_channels": SIZES,
    "model_type": (ABSENT, None, "vq"), "ch_mult": ([1, 2],), "per_layer_config": (None, {"0": {}}),
}  # fmt: skip
TOP = {
    "tie_word_embeddings": FLAGS, "image_token_id": IDS, "hidden_size": (24,), "vocab_size": (8,),
    "rope_scaling": ROPES[-9:], "rope_parameters": ROPES[-9:], "rope_theta": (5e4,),
    "rms_norm_eps": (1e-3,), "num_hidden_layers": (1,), "torch_dtype": (ABSENT, "float16"),
    "dtype": (ABSENT, "float32"),
    "text_config": (ABSENT, None, {}, [], "x"), "vision_config": (ABSENT, None, {}, []),
    "vq_config": (ABSENT, None, {}, []), "language_config": ({"hidden_size": 3},),
    "head_dim": (8,), "is_causal": FLAGS, "sliding_window": (None, 2), "tie_encoder": (True,),
    "per_layer_config": (None, {"0": {"hidden_size": 8}}), "temperature": (0.5,),
    "architectures": (ABSENT, ["LlamaForCausalLM"]), "guidance_scale": (3,), "pad_token_id": IDS,
}  # fmt: skip
EDITS = [
    ((*section, key), value)
    for section, keys in (
        ((), TOP),
        (("text_config",), TEXT),
        (("vision_config",), VISION),
        (("vq_config",), VQ),
    )
    for key, values in keys.items()
    for value in values
]


def edited(edits) -> dict:
    """The base config with some values replaced or removed."""
    config = base_config()
    for (*sections, key), value in edits:
        section = functools.reduce(lambda found, name: found.get(name), sections, config)
        if not isinstance(section, dict):
            continue  # removed by an earlier edit
        if value is ABSENT:
            section.pop(key, None)
        else:
            section[key] = copy.deepcopy(value)
    return config


def pairs(seed: int, number: int):
    """Pairs of edits of different keys; deterministic for a seed."""
    random_pairs = random.Random(seed)
    rope = [edit for edit in EDITS if "rope" in edit[0][-1]]
    for i in range(number):
        pool = rope if i % 4 == 0 else EDITS  # a quarter: keys that are alternatives
        yield tuple(random_pairs.sample(pool, 2))


class OtherNetwork(AssertionError):
    """The accepted config has other weights than transformers' model."""


class Comparison:
    """Compares each edited config with a config that states all sizes read from it.

    folder: an empty folder for weights.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._stated: dict[JanusConfig, dict[str, np.ndarray] | None] = {}

    def __call__(self, config: dict) -> str:
        """Returns `equal`, or who refuses it and why; raises AssertionError for another network."""
        try:
            cfg = read_config(config)
        except ValueError as error:
            assert str(error).startswith("config.json") and len(str(error)) < 300, str(error)
            return f"refused: {error}"
        folder = self._folder / str(abs(hash(cfg)))
        if cfg not in self._stated:
            folder.mkdir()
            self._stated[cfg] = self._run_stated(cfg, folder)
        stated = self._stated[cfg]
        if stated is None:
            return "too large"
        try:
            theirs = run_transformers(config, folder)
        except OtherNetwork:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return f"transformers refuses: {text}"
        for what, values in stated.items():
            np.testing.assert_array_equal(theirs[what], values, err_msg=what)
        return "equal"

    def _run_stated(self, cfg: JanusConfig, folder: Path) -> dict[str, np.ndarray] | None:
        table, shapes = table_for(TRANSFORMERS, cfg), param_shapes(cfg)
        steps = export_steps(table, list(shapes))
        wanted = {step.torch: torch_shape(step, shapes) for step in steps}
        if sum(map(math.prod, wanted.values())) > 2e7:
            return None
        numbers = np.random.default_rng(0)
        weights = {
            name: torch.from_numpy(numbers.normal(0, 0.2, shape).astype(np.float32))
            for name, shape in wanted.items()
        }
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        found = run_transformers(write_config(cfg, None, TRANSFORMERS, IMAGE_TOKEN), folder)
        side = cfg.gen_grid * cfg.gen_vq.downsample
        assert found["pixels"].shape == (1, side, side, 3)
        assert found["tokens"].shape == (1, cfg.num_image_tokens)
        return found


@torch.no_grad()
def run_transformers(config: dict, folder: Path) -> dict[str, np.ndarray]:
    """Outputs of JanusForConditionalGeneration for a folder's weights and this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    model, info = transformers.JanusForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    strangers = {kind: names for kind, names in info.items() if names}
    if strangers:
        raise OtherNetwork(f"transformers: {strangers}")
    model.eval()
    vocabulary = model.config.text_config.vocab_size
    ids = torch.arange(1, 9)[None] % vocabulary
    side = model.config.vision_config.image_size
    image = torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)
    found = {"logits": model(input_ids=ids).logits}
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for i in range(3):  # uses the cache, which some keys shorten
        out = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        found[f"step {i}"], cache = out.logits, out.past_key_values
    found["features"] = model.model.get_image_features(image).pooler_output
    hidden = torch.linspace(-1, 1, 2 * model.config.text_config.hidden_size).reshape(2, -1)
    found["drawn"] = model.model.generation_head(hidden)
    vision, codes = model.config.vision_config, model.config.vq_config.num_embeddings
    tokens = torch.arange(vision.num_image_tokens)[None] % codes
    found["embeds"] = model.prepare_embeddings_for_image_generation(tokens)
    found["tokens"], found["pixels"] = tokens, model.decode_image_tokens(tokens)
    return {name: value.numpy() for name, value in found.items()}


def single():
    """Each edit alone."""
    return ((edit,) for edit in EDITS)


def rope():
    """All combinations of values of the keys for the rotary embedding."""
    keys = ("rope_scaling", "rope_parameters", "rope_theta")
    for values in itertools.product(*(TEXT[key] for key in keys)):
        yield tuple((("text_config", key), v) for key, v in zip(keys, values, strict=True))
