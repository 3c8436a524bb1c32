"""compile_for with the real compilers for TPU and CUDA, for small models."""

import dataclasses
import json
from pathlib import Path

import pytest
from compilers import needs_cuda, needs_tpu

from janus_jax.aot.changes import find_change
from janus_jax.aot.compiled import DoesNotFitError
from janus_jax.aot.generation import Target, compile_draw
from janus_jax.aot.jobs import Draw
from janus_jax.aot.measure import measure
from janus_jax.aot.topology import described_devices
from janus_jax.commands import compile_for
from janus_jax.devices import known_devices
from janus_jax.models.janus import JanusConfig

SMALL = Path(__file__).parents[1] / "golden" / "janus_small"  # 2 decoder layers, 1 of SigLIP
TINY = "janus_tiny"
TRAIN = "--job train --config=finetune_lora --config.seq_len=256 --config.batch_size=32"
TOKENIZED = "--config.tokenized=True"  # the images to generate are read as tokens


def report(flags: str, capsys, model: str = str(SMALL)) -> dict:
    """Returns the report about a small model."""
    compile_for.main([*flags.split(), "--model", model, "--json"])
    return json.loads(capsys.readouterr().out)


def check_memory(memory: dict) -> None:
    assert memory["total"] == sum(memory["held"].values()) + memory["added"]
    assert 0 < memory["added"] < memory["total"] < memory["available"]


@needs_tpu
def test_an_answer_on_a_slice_of_tpus(capsys):
    facts = report("--device v5e --job answer --mesh tensor=2 --prompt_length 20", capsys)
    prompt, token = facts["programs"]
    check_memory(facts["memory"])
    assert facts["fits"] and facts["topology"] == "2x2"
    assert prompt["attention"].keys() == {"prefill", "und_encoder"}
    assert token["attention"].keys() == {"decode_step"}
    # one after attention and one after the MLP of each layer; choosing a token takes more
    assert 4 <= token["collectives"]["all-reduce"]["count"] <= 8
    assert token["weight_copies"] == {}
    assert "libtpu" in facts["versions"]


@needs_tpu
def test_an_image_on_a_tpu(capsys):
    facts = report("--device v5e --job draw --prompt_length 20", capsys)
    prompt, tokens, pixels = facts["programs"]
    check_memory(facts["memory"])
    assert [part["name"] for part in (prompt, tokens, pixels)] == ["prompt", "tokens", "pixels"]
    assert prompt["attention"] == {"prefill": ["XLA"]}  # too short for the kernel
    assert tokens["attention"] == {"decode_step": ["XLA"]}
    assert tokens["weight_copies"] == {}


@needs_tpu
def test_a_training_step_on_a_slice_of_tpus(capsys):
    facts = report(f"--device v5p --topology 2x2x1 {TRAIN}", capsys)
    image_tokens, step = facts["programs"]
    assert image_tokens["name"] == "image_tokens" and image_tokens["collectives"] == {}
    check_memory(facts["memory"])
    assert facts["memory"]["held"].keys() == {"params", "optimizer", "frozen", "batch"}
    assert facts["mesh"] == "fsdp=4" and "decode_step" not in facts
    assert step["collectives"]["all-gather"]["count"] >= 14  # the weights of two layers
    for part in ("decoder", "decoder backward"):
        assert step["attention"][part] == ["splash attention"]


@needs_tpu
def test_a_model_that_is_too_large_for_the_memory_is_refused_by_the_compiler():
    cfg = JanusConfig.janus_tiny()
    decoder = dataclasses.replace(cfg.language_model, vocab_size=2**26)  # 34 GB
    target = Target(
        dataclasses.replace(cfg, language_model=decoder),
        described_devices(known_devices()["v5e"], 1)[0],
    )
    with pytest.raises(DoesNotFitError, match="prompt") as error:
        next(compile_draw(target, 20, 1))
    assert 34e9 < error.value.needed_bytes < 36e9


@needs_cuda
def test_the_change_with_which_a_job_would_fit_was_compiled():
    facts, cfg = known_devices()["rtx-4090"], JanusConfig.janus_tiny()
    job = Draw(facts=facts, cfg=cfg, prompt_length=20, num_images=4, max_batch=4)
    measured = measure(job)
    # Too little for four images. It seems enough for half of them, but the decoder of the images
    # needs almost as much for two as for four.
    memory = sum(measured.held.values()) + int(0.7 * measured.added)
    limited = dataclasses.replace(job, facts=dataclasses.replace(facts, memory_bytes=memory))
    advice = find_change(dataclasses.replace(measured, job=limited), 1.0)
    assert advice.tried == ("--max_batch 2", "--max_batch 1")
    assert advice.change.text == "--max_batch 1" and measure(advice.change.job).total <= memory


@needs_cuda
def test_an_image_on_a_gpu(capsys):
    facts = report("--device rtx-4090 --job draw --num_images 2 --prompt_length 20", capsys, TINY)
    assert [part["name"] for part in facts["programs"]] == ["prompt", "tokens", "pixels"]
    check_memory(facts["memory"])
    tokens, step = facts["programs"][1], facts["decode_step"]
    assert 60 < tokens["kernels_per_token"] < 120  # 18 to 23 a layer
    assert tokens["kernels_per_token"] == sum(tokens["kernels_by_kind"].values())
    seconds = (step["weights"] + step["cache"]) / known_devices()["rtx-4090"].memory_bytes_per_s
    assert step["floor_ms"] == pytest.approx(1000 * seconds, abs=1e-4)


@needs_cuda
def test_a_program_that_triton_refuses_is_compiled_without_it(capsys):
    """Some of the widths of SMALL cannot have XLA's default tiles."""
    facts = report("--device h100 --job draw --prompt_length 20", capsys)
    options = [part.get("options", {}) for part in facts["programs"]]
    assert {"xla_gpu_enable_triton_gemm": False} in options


@needs_cuda
def test_an_answer_on_a_gpu(capsys):
    facts = report("--device h100 --job answer --prompt_length 200", capsys, TINY)
    prompt, token = facts["programs"]
    check_memory(facts["memory"])
    assert prompt["attention"]["prefill"] == ["cuDNN"]
    assert token["attention"] == {"decode_step": ["XLA"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "remat", "limit"),
    [
        pytest.param("h100", "dots", 20e9, marks=needs_cuda),
        pytest.param("h100", "full", 7e9, marks=needs_cuda),
        pytest.param("v5p", "full", 9e9, marks=needs_tpu),
    ],
)
def test_the_memory_of_a_training_step(device, remat, limit, capsys):
    """Of stage 2 of Janus-Pro-1B, as docs/development.md states it. Takes minutes."""
    settings = dict(remat=remat, batch_size=4, streams=4, tokenized=True)
    changed = " ".join(f"--config.{name}={value}" for name, value in settings.items())
    flags = f"--device {device} --job train --config=janus_pro_1b_stage2 {changed}"
    facts = report(flags, capsys, "janus_pro_1b")
    assert facts["memory"]["added"] < limit
    assert facts["programs"][0]["code"] < 0.1e9  # layers share their code


@needs_cuda
def test_a_training_step_on_gpus(capsys):
    facts = report(f"--device h100 --count 4 {TRAIN} {TOKENIZED}", capsys, TINY)
    check_memory(facts["memory"])
    assert facts["num_devices"] == 4
    (step,), memory = facts["programs"], facts["memory"]["held"]
    assert step["attention"]["decoder"] == step["attention"]["decoder backward"] == ["cuDNN"]
    gathered, microbatches = step["collectives"]["all-gather"], facts["settings"]["accumulate"]
    assert gathered["count"] >= 28  # of four layers
    # for the forward pass, the recomputation and the backward pass
    assert gathered["bytes"] <= microbatches * 3 * 4 * memory["frozen"]


@needs_cuda
def test_gradients_are_sent_matrix_by_matrix_on_gpus(capsys):
    """XLA would combine them, and then keep the full gradients of all layers."""
    full = "--config.lora_rank=0 --config.accumulate=1 --config.batch_size=4"
    facts = report(f"--device h100 --count 4 {TRAIN} {TOKENIZED} {full}", capsys, TINY)
    collectives, params = facts["programs"][0]["collectives"], 4 * facts["memory"]["held"]["params"]
    assert collectives["reduce-scatter"]["count"] >= 28  # of four layers
    # float32 parameters, of which bfloat16 copies are gathered three times; no optimizer state
    assert collectives["all-gather"]["bytes"] <= 3 * params / 2
