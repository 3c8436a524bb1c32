"""The model families, and which of them a config.json or a model's config belongs to."""

from collections.abc import Callable, Mapping

from janus_jax.families.config import check_sizes, config_error
from janus_jax.families.family import DEEPSEEK, TRANSFORMERS, Family, ModelConfig, Sizes
from janus_jax.families.janus import JANUS

FAMILIES = (JANUS,)
FLOW_KEYS = ("vision_gen_enc_config", "vision_gen_dec_config", "vision_und_enc_config")
GEN_KEYS = ("gen_vision_config", "gen_aligner_config", "gen_head_config")


def detect_layout(config: Mapping) -> tuple[Family, str]:
    """Returns the family and the name of the layout of the contents of a config.json.

    Raises:
      ValueError: the config is that of JanusFlow, DeepSeek-VL or another model.
    """
    flow = [key for key in FLOW_KEYS if key in config]
    if flow:
        raise ValueError(
            f"config.json is of a JanusFlow model (it has {flow[0]}); only Janus models are "
            "supported"
        )
    model_type = config.get("model_type")
    layouts = {"multi_modality": DEEPSEEK, "janus": TRANSFORMERS}
    if not isinstance(model_type, str) or model_type not in layouts:
        raise config_error("model_type", "'multi_modality' or 'janus'", model_type)
    if model_type == "multi_modality" and not any(key in config for key in GEN_KEYS):
        raise ValueError(
            f"config.json is of a DeepSeek-VL model (it has no {GEN_KEYS[0]}), which cannot "
            "generate images; only Janus models are supported"
        )
    return JANUS, layouts[model_type]


def family_of(cfg: ModelConfig) -> Family:
    """Returns the family of a model's config."""
    return next(family for family in FAMILIES if isinstance(cfg, family.config_class))


def released_models() -> dict[str, Callable[[], ModelConfig]]:
    """Returns the functions that return the configs of all released models, by name."""
    return {name: make for family in FAMILIES for name, make in family.released.items()}


def sizes_of(cfg: ModelConfig) -> Sizes:
    """Returns the sizes of a model that matter outside of the networks."""
    return family_of(cfg).sizes(cfg)


def read_config(config: Mapping) -> ModelConfig:
    """Reads a model's sizes from the contents of a config.json.

    The dtype fields of the result keep their default, float32.

    Raises:
      ValueError: the config is that of another model, or a value is missing or not supported.
    """
    family, layout = detect_layout(config)
    try:
        cfg = family.layouts[layout].read(config)
        check_sizes(cfg)
        family.check(cfg)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json has a value of a wrong type: {error}") from None
    return cfg


def write_config(
    cfg: ModelConfig, source: Mapping | None, layout: str, image_token_id: int | None = None
) -> dict:
    """Returns the contents of a config.json in the given layout.

    Args:
      cfg: the model's sizes.
      source: contents of the original config.json, or None; returned unchanged if it already has
        the layout.
      layout: DEEPSEEK or TRANSFORMERS.
      image_token_id: id of `<image_placeholder>`; only the `transformers` layout needs it.

    Raises:
      ValueError: the layout cannot express this model.
    """
    if source is not None and detect_layout(source)[1] == layout:
        return dict(source)
    return family_of(cfg).layouts[layout].write(cfg, _source_dtype(source), image_token_id)


def _source_dtype(source: Mapping | None) -> str:
    source = source or {}
    decoder = source.get("text_config") or source.get("language_config") or {}
    for section in (source, decoder):
        for key in ("torch_dtype", "dtype"):
            if isinstance(section.get(key), str):
                return section[key]
    return "bfloat16"
