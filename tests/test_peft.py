"""LoRA adapters written by PEFT and merged here, and written here and merged by PEFT."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch_reference import (
    assert_close,
    channels_first,
    read_with_images,
    tiny_pair,
    to_numpy,
    two_images_a_row,
)

from janus_jax.interop.adapter import ADAPTER_WEIGHTS
from janus_jax.interop.adapter_writing import write_adapter
from janus_jax.interop.load import build_model, load_params, open_folder, param_shapes, table_for
from janus_jax.interop.rules import export_steps
from janus_jax.interop.stored import stored_params

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Modules of every kind: linear with and without a bias, embeddings, convolutions, both heads.
EVERY_KIND = [
    *("q_proj", "v_proj", "projection_layer", "fc1", "down_proj", "proj_out", "lm_head"),
    *("vision_head", "embed_tokens", "generation_embeddings", "position_embedding", "conv_in"),
    "patch_embedding",
]
PATTERNS = dict(
    rank_pattern={"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "lm_head": 5},
    alpha_pattern={"fc1": 5, "language_model.layers.0.self_attn.q_proj": 11.5},
)
CASES = {
    "patterns": dict(r=4, lora_alpha=6, target_modules=EVERY_KIND, use_rslora=True, **PATTERNS),
    "regex": dict(
        r=3,
        lora_alpha=2,
        target_modules=r"model\.(language_model|aligner)\..*(_proj|fc1|hidden_layers\.\d+)",
        exclude_modules=["o_proj", "layers.0.mlp.gate_proj"],
        fan_in_fan_out=True,
    ),
    "layers": dict(r=2, target_modules=["k_proj", "fc2"], layers_to_transform=1),
    "named layers": dict(
        r=2, target_modules=["k_proj"], layers_to_transform=[0], layers_pattern="encoder.layers"
    ),
}


def from_peft(model: torch.nn.Module, folder, **settings) -> torch.nn.Module:
    """Writes a LoRA adapter with random factors; returns the model that PEFT merged it into."""
    torch.manual_seed(1)
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def params_of(folder, adapter=None, dtype=jnp.float32):
    return load_params(open_folder(folder, adapter), dtype)


def tensors_of(folder, adapter=None) -> dict[str, np.ndarray]:
    """The parameters in PyTorch's layout by PyTorch name."""
    opened = open_folder(folder, adapter)
    stored = stored_params(opened)
    steps = export_steps(table_for(opened.layout, opened.cfg), list(stored.metadata))
    return {s.torch: s.op.to_torch(tuple(map(stored.read, s.paths))) for s in steps}


def assert_same_tensors(ours, theirs: torch.nn.Module, base: torch.nn.Module, adapted: int) -> None:
    """Compares the shared tensors; `adapted` of them must differ from the base."""
    expected, before = theirs.state_dict(), base.state_dict()
    shared = [name for name in ours if name in expected]
    for name in shared:
        assert_close(name, ours[name], expected[name], atol=1e-6)
    assert sum(not torch.equal(expected[name], before[name]) for name in shared) == adapted > 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of transformers and the folder that it saved."""
    theirs = tiny_pair()[0]
    folder = tmp_path_factory.mktemp("base")
    theirs.save_pretrained(folder)
    return theirs, folder


def assert_same_logits(params, theirs, cfg) -> None:
    """Text logits after two images per row, and logits of the image head."""
    ours = build_model(cfg, params)
    tokens, pixels = two_images_a_row()
    images = channels_first(pixels.reshape(4, 16, 16, 3))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens), pixel_values=images).logits
    got = read_with_images(ours, tokens, pixels)
    assert_close("text logits", got, expected, 1e-4)
    hidden = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.model.generation_head(torch.tensor(hidden))
    assert_close("image logits", ours.gen_head(hidden), expected, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_peft_s_weights(base, tmp_path, case):
    theirs, folder = base
    merged = from_peft(theirs, tmp_path, **CASES[case])
    adapted = {"patterns": 30, "regex": 13, "layers": 3, "named layers": 1}[case]
    assert_same_tensors(tensors_of(folder, tmp_path), merged, theirs, adapted)


def test_an_adapter_of_peft_gives_peft_s_logits(base, tmp_path):
    theirs, folder = base
    merged = from_peft(theirs, tmp_path, **CASES["patterns"])
    assert_same_logits(params_of(folder, tmp_path), merged, open_folder(folder).cfg)


@pytest.mark.parametrize(
    ("part", "targets"),
    [("model", ["q_proj", "fc1"]), ("model.language_model", ["v_proj"]), ("model.aligner", None)],
)
def test_an_adapter_of_a_part_of_the_model(base, tmp_path, part, targets):
    """Module names identify the part of the model that PEFT wrapped, unless it is too small."""
    theirs, folder = base
    if targets is None:
        from_peft(theirs.get_submodule(part), tmp_path, r=2, target_modules=["fc1"])
        with pytest.raises(ValueError, match=r"\b2 .*unknown.*base_model.model.fc1.lora_A"):
            params_of(folder, tmp_path)
        return
    merged, whole = copy.deepcopy(theirs), copy.deepcopy(theirs)
    changed = from_peft(theirs.get_submodule(part), tmp_path, r=2, target_modules=targets)
    merged.set_submodule(part, changed)
    adapted = 8 if part == "model" else 2
    assert_same_tensors(tensors_of(folder, tmp_path), merged, whole, adapted)


class Named(torch.nn.Module):
    """Modules with DeepSeek's names, one for each weight with at least two axes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            if name.endswith(".weight") and tensor.ndim > 1:
                self._add(name.removesuffix(".weight").split("."), tensor.float())

    def _add(self, names: list[str], weight: torch.Tensor) -> None:
        parent = self
        for name in names[:-1]:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        rows, columns, *kernel = weight.shape
        if "embed" in names[-1]:
            module = torch.nn.Embedding(rows, columns)
        elif kernel:
            module = torch.nn.Conv2d(columns, rows, kernel, bias=False)
        else:
            module = torch.nn.Linear(columns, rows, bias=False)
        module.weight.data = weight.clone()
        parent.add_module(names[-1], module)


@pytest.fixture(scope="module")
def deepseek(golden):
    """The small checkpoint: torch modules in float32, and the folder."""
    folder = golden / "janus_small"
    return Named(safetensors.torch.load_file(folder / "model.safetensors")), folder


def assert_deepseek(deepseek, adapter, merged, adapted: int) -> None:
    """Compares parameters in float32; the stored bfloat16 is cast before the sum."""
    named, folder = deepseek
    opened, params = open_folder(folder), params_of(folder, adapter)
    steps = export_steps(table_for("deepseek", opened.cfg), list(params))
    ours = {s.torch: s.op.to_torch(tuple(np.asarray(params[p]) for p in s.paths)) for s in steps}
    assert_same_tensors(ours, merged, named, adapted)


DEEPSEEK_TARGETS = [
    *("q_proj", "down_proj", "lm_head", "embed_tokens", "qkv", "fc1", "blocks.0.attn.proj"),
    *("aligner.layers.0", "output_mlp_projector", "vision_head", "gen_embed", "patch_embed.proj"),
]


def test_an_adapter_with_deepseek_s_names(deepseek, tmp_path):
    """Fused qkv, aligners, both heads and embeddings; updates of the pooling head are ignored."""
    settings = dict(r=3, lora_alpha=5, target_modules=DEEPSEEK_TARGETS)
    merged = from_peft(deepseek[0], tmp_path, rank_pattern={"qkv": 4}, **settings)
    names = safetensors.torch.load_file(tmp_path / ADAPTER_WEIGHTS[0])
    assert any("blocks.0.attn.qkv.lora_B" in name for name in names)
    assert_deepseek(deepseek, tmp_path, merged, 14)


def test_an_adapter_of_deepseek_s_decoder_alone_in_a_bin_file(deepseek, tmp_path):
    """Users wrap model.language_model, because DeepSeek's whole model has no forward method."""
    named, _ = deepseek
    decoder = copy.deepcopy(named.language_model)
    targets = dict(target_modules=["o_proj", "lm_head"], r=2)
    merged = copy.deepcopy(named)
    merged.language_model = from_peft(decoder, tmp_path, **targets)
    stored = safetensors.torch.load_file(tmp_path / ADAPTER_WEIGHTS[0])
    (tmp_path / ADAPTER_WEIGHTS[0]).unlink()
    torch.save(stored, tmp_path / ADAPTER_WEIGHTS[1])
    assert_deepseek(deepseek, tmp_path, merged, 3)


def test_an_adapter_with_the_other_layout_s_names(deepseek, tmp_path):
    """transformers' module names on a folder in DeepSeek's layout; rounded once to bfloat16."""
    _, folder = deepseek
    cfg = open_folder(folder).cfg
    factors = random_factors(cfg, "und_encoder.blocks.0.attn.q_proj", "gen_head.proj")
    for layout in ("deepseek", "transformers"):
        table, shapes = table_for(layout, cfg), param_shapes(cfg)
        write_adapter(tmp_path / layout, table, shapes, factors, alpha=6, base="")
    one, other = (params_of(folder, tmp_path / name) for name in ("deepseek", "transformers"))
    rounded = params_of(folder, tmp_path / "transformers", jnp.bfloat16)
    before = params_of(folder)
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)
        changed = path.removesuffix(".kernel") in {p.removesuffix(".kernel") for p in factors}
        assert changed != np.array_equal(value, before[path])
        if not path.startswith("gen_vq"):
            np.testing.assert_array_equal(value.astype(jnp.bfloat16), rounded[path], err_msg=path)


def random_factors(cfg, *layers: str, rank: int = 3):
    rng, shapes = np.random.default_rng(2), param_shapes(cfg)
    factors = {}
    for path in (f"{layer}.kernel" for layer in layers):
        inputs, outputs = shapes[path]
        sizes = ((inputs, rank), (rank, outputs))
        factors[path] = tuple(rng.normal(size=size).astype(np.float32) for size in sizes)
    return factors


def test_peft_loads_an_adapter_that_we_wrote(base, tmp_path):
    theirs, folder = base
    cfg = open_folder(folder).cfg
    layers = (
        "language_model.layers.1.self_attn.q_proj",
        "language_model.layers.0.mlp.down_proj",
        "und_encoder.blocks.1.attn.out_proj",
        "und_encoder.blocks.0.mlp.fc2",
        "und_aligner.layers.1",
        "gen_head.proj",
        "gen_head.out",
        "language_model.lm_head",
    )
    table, factors = table_for("transformers", cfg), random_factors(cfg, *layers)
    write_adapter(tmp_path / "a", table, param_shapes(cfg), factors, alpha=0.5, base=str(folder))
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "a")
    assert_same_logits(params_of(folder, tmp_path / "a"), adapted.merge_and_unload(), cfg)


def test_peft_loads_a_fused_qkv_that_we_wrote(deepseek, tmp_path):
    """Two of three layers have factors: one update of twice the rank, zeros for the third."""
    named, folder = deepseek
    cfg, block = open_folder(folder).cfg, "und_encoder.blocks.0.attn"
    factors = random_factors(cfg, f"{block}.q_proj", f"{block}.v_proj", "und_aligner.layers.0")
    table, target = table_for("deepseek", cfg), tmp_path / "a"
    write_adapter(target, table, param_shapes(cfg), factors, alpha=7, base="")
    config = json.loads((target / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].values()) == [6] and config["r"] == 3
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(named), target)
    merged = adapted.merge_and_unload()
    assert_deepseek(deepseek, target, merged, 2)
    fused = to_numpy(merged.get_submodule("vision_model.vision_tower.blocks.0.attn.qkv").weight)
    before = params_of(folder)
    for i, name in enumerate("qkv"):
        path, kernel = f"{block}.{name}_proj.kernel", fused[24 * i : 24 * (i + 1)].T
        a, b = factors.get(path, (np.zeros((24, 3)), np.zeros((3, 24))))
        assert_close(path, kernel, before[path] + 7 / 3 * a @ b, atol=1e-5)
