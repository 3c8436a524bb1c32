"""The command compile_for: which jobs the flags describe, and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from one_line import assert_one_line
from stage_configs import SMALL

from janus_jax.aot import changes, jobs, measure, topology
from janus_jax.commands import compile_for
from janus_jax.devices import facts_of, known_devices
from janus_jax.models.janus import JanusConfig

DRAW = "--job draw --model janus_tiny --device"
ANSWER = "--job answer --model janus_tiny --device"
TRAIN = "--job train --model janus_tiny --config=finetune_lora --device"


def make_job(flags: str) -> jobs.Job:
    """Returns the job of a command line."""
    parser = compile_for.make_parser()
    args, overrides = parser.parse_known_args(flags.split())
    return compile_for.make_job(args, overrides, parser.flag_names())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (f"{DRAW} h200 --count 2", ("--count", "draw")),
        (f"{DRAW} v5e --config=finetune_lora", ("--config", "draw")),
        (f"{DRAW} v5e --topology 2x2", ("--topology", "--mesh")),
        (f"{DRAW} v5e --mesh tensor=2 --topology 2x3", ("v5e", "2x2", "'2x3'")),
        (f"{DRAW} v5e --mesh tensor=8 --topology 2x2", ("8 devices", "v5e:2x2")),
        (f"{DRAW} v5e --mesh tensor=512", ("256", "512")),
        (f"{DRAW} h100 --mesh tensor=2 --topology 2x2", ("topology", "h100")),
        (f"{DRAW} h100 --mesh tensor=12", ("8", "12")),
        (f"{DRAW} h100 --mesh tensors=2", ("tensors=2",)),
        ("--job draw --device h100", ("--model",)),
        ("--job draw --device h100 --model janus_8b", ("janus_8b", "janus_pro_7b")),
        ("--job train --device h100 --model janus_tiny", ("--config",)),
        (f"{TRAIN} h100 --max_batch 2", ("--max_batch", "train")),
        (f"{TRAIN} h100 --count 2 --mesh fsdp=2", ("--count", "--mesh")),
        (f"{TRAIN} h100 --config.batchsize=2", ("batchsize",)),
        (f"{TRAIN} h100 --topolgy 2x2", ("--topolgy", "--topology")),
        ("--job train --config=finetune_lora --device h100", ("--model", "Janus-Pro-1B")),
        ("--job train --config=janus_tiny_vq --device h100", ("stage", "'vq'")),
        (f"{TRAIN} v5e --count 2", ("--count", "v5e")),
        (f"{TRAIN} h100 --num_images 2", ("--num_images", "train")),
        (f"{TRAIN} h100 --count 2 --config.mesh=fsdp=4", ("--count", "fsdp=4")),
        (f"{DRAW} v5e --max_new_tokens 2", ("--max_new_tokens", "draw")),
        (f"{DRAW} v5e --memory_fraction 0.5", ("--memory_fraction", "v5e")),
        (f"{DRAW} v5e --bogus", ("--bogus",)),
        (f"{DRAW} h100 --mesh tensor=0", ("tensor", "0")),
        (f"{DRAW} h100 --mesh tensor=3", ("tensor=3", "4 attention heads")),
        (f"{DRAW} h100 --prompt_length 4090", ("4096", "4126")),
        (f"{ANSWER} h100 --prompt_length 71 --num_images 2", ("72", "71")),
        (f"{DRAW} h100 --num_images 0", ("0",)),
        (f"{DRAW} h100 --memory_fraction 2", ("(0, 1]", "2")),
        ("--job draw --model janus_tiny --device h300", ("h300", "h100")),
    ],
)
def test_what_it_refuses_takes_one_line(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(topology, "_describe", lambda facts, name, **_: range(512))
    with pytest.raises(SystemExit) as stopped:
        compile_for.main(flags.split())
    assert stopped.value.code == 2
    assert_one_line(capsys.readouterr().err.splitlines()[-1], "compile_for", *words)


def test_a_compiler_that_is_not_installed_is_named(capsys, monkeypatch):
    def describe(*_, **__):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", describe)
    for device, extra in dict(v5p="[compile-tpu]", l4="[compile-cuda]").items():
        with pytest.raises(SystemExit) as stopped:
            compile_for.main(f"{DRAW} {device}".split())
        assert stopped.value.code == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert_one_line(error, "compile_for", "no plugin", extra)


def test_the_model_is_a_released_one_or_a_folder():
    released = JanusConfig.janus_tiny().with_dtype(jnp.bfloat16)
    assert make_job(f"{DRAW} v5e").cfg == released
    folder = make_job(f"--job draw --device v5e --model {SMALL}")
    assert folder.cfg.language_model.hidden_size == 48


def test_the_mesh_of_a_run_is_all_devices_of_topology_or_count():
    meshes = {
        "v5e": "fsdp=1",
        "v5e --topology 4x4": "fsdp=16",
        "tpu7x --topology 2x2x1": "fsdp=8",  # two devices a chip
        "h100 --count 8": "fsdp=8",
        "h100 --mesh tensor=2": "tensor=2",
        "h100 --config.mesh=data=4": "data=4",
    }
    for flags, mesh in meshes.items():
        job = make_job(f"{TRAIN} {flags}")
        assert job.mesh == mesh
        assert job.config.remat == "full"


def test_the_prompt_is_longer_for_a_question_about_an_image():
    assert make_job(f"{DRAW} v5e").prompt_length == 64
    answer = "--job answer --model janus_pro_7b --device v5e"
    assert make_job(answer).prompt_length == 640
    assert make_job(f"{answer} --num_images 3").prompt_length == 64 + 3 * 576


def test_the_report_can_be_read_by_programs(capsys, monkeypatch):
    moved = {"all-reduce": (2, 8)}
    part = measure.PartFacts("tokens", 1.0, 2.0, 2.0, {}, 3, 3, 0, {}, moved, {"fusion": 4}, {})

    def measured(job, fraction, report):
        return measure.Measurement(job, dict(parameters=5), (part,), 100, jobs.Step(7, 2.0))

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(jobs, "described_devices", lambda facts, count, _: jax.devices()[:count])
    compile_for.main(f"{DRAW} h100 --json".split())
    report = json.loads(capsys.readouterr().out)
    memory = dict(held=dict(parameters=5), added=3, total=8, available=100)
    assert report["memory"] == memory | dict(device=known_devices()["h100"].memory_bytes)
    assert report["programs"][0]["collectives"] == {"all-reduce": dict(count=2, bytes=8)}
    assert report["programs"][0]["kernels_per_token"] == 4
    assert report["fits"] and report["device"] == "h100"


def test_devices_have_published_facts():
    for name, facts in known_devices().items():
        assert facts.sources and facts.platform in ("tpu", "cuda")
        assert facts_of(facts.device_kinds[0]) is facts
        assert 10e9 < facts.memory_bytes < 200e9, name
        assert 1e11 < facts.memory_bytes_per_s < 1e13, name
        assert 1e14 < facts.peak_flops < 3e15, name
    wanted = "v5e v5p v6e tpu7x h100 h200 a100-40gb a100-80gb l4 rtx-4090"
    assert set(wanted.split()) == set(topology.device_names())
    text = topology.gpu_description(known_devices()["l4"])
    assert "major: 8 minor: 9" in text and "memory_bandwidth: 300000000000 " in text


def test_a_job_that_does_not_fit_ends_with_status_1(capsys, monkeypatch):
    facts = dict(kernels={"fusion": 4, "cuBLAS": 1}, weight_copies={"copy to bf16[2,2]": 3})
    attention = {"prefill": ("cuDNN",)}
    options, printed = {"xla_gpu_enable_x": False}, []
    sizes = 10**9, 10**8, 0
    part = measure.PartFacts("tokens", 1.0, 2.0, 2.0, options, *sizes, attention, {}, **facts)

    def measured(job, fraction, report):
        return measure.Measurement(job, dict(parameters=10**9), (part,), 10**9, None)

    def find_change(*_):  # which takes minutes
        printed.append(capsys.readouterr().out)
        return changes.Advice(None, ("--max_batch 1",))

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(changes, "find_change", find_change)
    monkeypatch.setattr(jobs, "described_devices", lambda facts, count, _: jax.devices()[:count])
    with pytest.raises(SystemExit) as stopped:
        compile_for.main(f"{DRAW} h100".split())
    assert stopped.value.code == 1
    words = ("janus_tiny", "h100", "0.10 GB of it temporary", "prefill: cuDNN", "5 kernels", "4 fu")
    words += ("copy to bf16[2,2]", "2.00 GB of 1.00 GB", "xla_gpu_enable_x=false")
    assert [word for word in words if word not in printed[0]] == []
    assert capsys.readouterr().out == "does not fit, also not with any of: --max_batch 1\n"


def test_a_change_that_cannot_be_compiled_is_not_the_advice(monkeypatch):
    def compiled(job, fraction, report):
        if job.max_batch == 3:
            raise ValueError("XLA cannot compile it")
        return measure.Measurement(job, {}, (), 1, None)

    job, texts = make_job(f"{DRAW} v5e --num_images 8"), []
    too_large = measure.Measurement(job, dict(parameters=2), (), 1, None)
    smaller = [dataclasses.replace(job, max_batch=batch) for batch in (3, 2)]
    tried = [changes.Change(f"--max_batch {each.max_batch}", each, 0.75) for each in smaller]
    monkeypatch.setattr(changes, "possible_changes", lambda *_: tried)
    monkeypatch.setattr(changes, "_seems_to_fit", lambda *_: True)
    monkeypatch.setattr(changes, "measure", compiled)
    advice = changes.find_change(too_large, 0.75, texts.append)
    assert advice == changes.Advice(tried[1], ("--max_batch 3", "--max_batch 2"))
    assert "XLA cannot compile it" in texts


def test_the_mesh_of_a_training_step(monkeypatch):
    monkeypatch.setattr(jobs, "described_devices", lambda facts, count, _: jax.devices()[:count])
    job = make_job(f"{TRAIN} v5e --topology 2x2 --mesh fsdp=2,tensor=2 --config.batch_size=32")
    assert dict(job.program.inputs.mesh.shape) == dict(data=1, fsdp=2, tensor=2)
    job = make_job(f"{TRAIN} v5e --topology 2x2 --config.batch_size=32")
    assert dict(job.program.inputs.mesh.shape) == dict(data=1, fsdp=4, tensor=1)


def test_changes_of_a_job_on_gpus():
    job = make_job(f"{TRAIN} h100 --count 8 --config.batch_size=64 --config.remat=dots")
    found = list(changes.possible_changes(measure.Measurement(job, {}, (), 1, None), 0.75))
    texts = [change.text for change in found]
    assert texts[0] == "--memory_fraction 0.95 (to run: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)"
    assert texts[1] == "--config.remat=full"
    assert "--config.remat=full --config.accumulate=16" in texts
    assert texts[-1] == "--mesh fsdp=64"
    # only the first change takes another share of the memory
    assert [change.memory_fraction for change in found] == [0.95] + [0.75] * (len(found) - 1)


@pytest.mark.parametrize(
    ("memory", "text"),
    [(110, "--max_batch 3"), (70, "--mesh tensor=4"), (1, None)],
)
def test_the_smallest_change_that_fits_is_found(memory, text, monkeypatch):
    """The model takes 80 bytes, and each of 8 images 10."""
    monkeypatch.setattr(jobs.Draw, "batch", property(lambda job: job.max_batch or 8))
    monkeypatch.setattr(jobs.Draw, "held", lambda job: dict(parameters=80 // job.num_devices))

    def compiled(job, fraction, report=None):
        added = 10 * job.batch // job.num_devices
        part = measure.PartFacts("tokens", 0.0, 0.0, 0.0, {}, added, added, 0, {}, {})
        return measure.Measurement(job, job.held(), (part,), memory, None)

    monkeypatch.setattr(changes, "measure", compiled)
    job = make_job(f"{DRAW} v5e --num_images 8")
    job = dataclasses.replace(job, facts=dataclasses.replace(job.facts, memory_bytes=memory))
    advice = changes.find_change(compiled(job, 0.75), 0.75)
    assert (advice.change and advice.change.text) == text
    assert advice.tried == ((text,) if text else ())
