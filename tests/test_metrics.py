"""The log of a run: its lines, what a resumed run keeps of them, and the MFU."""

import dataclasses
import json
import re
import struct
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from limits import full_disk
from tensorboardX.proto.event_pb2 import Event

from janus_jax.data.records import KINDS
from janus_jax.interop.load import abstract, leaves_by_path
from janus_jax.models.janus import JanusConfig
from janus_jax.training import metrics
from janus_jax.training.flops import StepFlops, peak_flops, step_flops
from janus_jax.training.metrics import EVENTS, METRICS, Log


def _metrics(
    loss=2.0,
    sums=(8.0, 0.0, 6.0),
    counts=(4.0, 0.0, 3.0),
    tokens=100.0,
    positions=128.0,
    grad_norm=0.5,
    weight=None,
    param_norm=1.0,
):
    kinds = ("understanding", "text", "generation")
    numbers = dict(
        sums=dict(zip(kinds, sums, strict=True)),
        counts=dict(zip(kinds, counts, strict=True)),
        loss=loss,
        grad_norm=grad_norm,
        weight=sum(counts) if weight is None else weight,
        param_norm=param_norm,
        tokens=tokens,
        positions=positions,
        learning_rate=0.25,
    )
    return {
        name: {kind: jnp.float32(x) for kind, x in value.items()}
        if isinstance(value, dict)
        else jnp.float32(value)
        for name, value in numbers.items()
    }


def _lines(folder) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (folder / METRICS).read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _events(folder) -> list[Event]:
    """Reads the events. TFRecord framing: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted((folder / EVENTS).iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            found.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += 12 + length + 4
    return found


def _logged(folder) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in _events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


@pytest.fixture
def clock(monkeypatch):
    """The clock of the log, in seconds, set by the test."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def _run(folder, clock, steps, *, seconds=2.0, log_every=2, start=0, peak=1e6, total=5):
    with Log(folder, total, log_every, peak, start, dict, KINDS) as log:
        for step in range(start + 1, start + 1 + steps):
            clock.now += 60 if step == start + 1 else seconds  # the first step is compiled
            log.step(step, _metrics(loss=float(step)), [["a"]], flops=3e5)


def test_lines_come_at_the_first_at_every_nth_and_at_the_last(tmp_path, clock):
    _run(tmp_path, clock, 5)
    first, *others = _lines(tmp_path)
    assert [line["step"] for line in (first, *others)] == [1, 2, 4, 5]
    assert list(first) == ["step", "loss", "understanding", "generation", "grad_norm",
                           "learning_rate", "packing_efficiency"]  # fmt: skip
    assert [line["loss"] for line in others] == [2.0, 3.5, 5.0]
    assert others[1] == {
        "step": 4,
        "loss": 3.5,
        "understanding": 2.0,
        "generation": 2.0,
        "grad_norm": 0.5,
        "learning_rate": 0.25,
        "packing_efficiency": 100 / 128,
        "tokens_per_s": 50.0,
        "mfu": pytest.approx(3e5 / 2 / 1e6),
        "seconds_left": 2.0,
    }


def test_a_line_means_over_targets_and_over_its_own_steps_only(tmp_path, clock):
    with Log(tmp_path, 9, 3, None, 0, dict) as log:
        log.step(1, _metrics(loss=7.0), [], 0.0)
        second = _metrics(2.5, (20.0, 0.0, 0.0), (8.0, 0.0, 0.0), grad_norm=1.0, weight=4.0)
        log.step(2, second, [], 0.0)
        clock.now += 4
        log.step(3, _metrics(3.0, (1.0, 5.0, 0.0), (1.0, 1.0, 0.0), grad_norm=3.0), [], 0.0)
    line = _lines(tmp_path)[-1]
    assert line["loss"] == pytest.approx((2.5 * 4 + 3.0 * 2) / 6)
    assert line["understanding"] == pytest.approx(21 / 9)
    assert line["text"] == 5.0
    assert line["grad_norm"] == 2.0
    assert line["tokens_per_s"] == 50.0
    assert "generation" not in line and "mfu" not in line


def test_a_line_has_the_terms_that_the_loss_returns(tmp_path):
    sums, counts = dict(accuracy=3.0, kl=2.0, policy=-1.0), dict(accuracy=4.0, kl=8.0, policy=0.0)
    terms = dict(sums=sums, counts=counts)
    with Log(tmp_path, 9, 1, None, 0, dict, ["policy", "kl"]) as log:
        log.step(1, _metrics() | terms, [], 0.0)
        counts["policy"] = 2.0
        log.step(2, _metrics() | terms, [], 0.0)
    first, second = _lines(tmp_path)
    assert list(first)[:4] == ["step", "loss", "kl", "accuracy"]
    assert list(second)[:5] == ["step", "loss", "policy", "kl", "accuracy"]
    assert [second[name] for name in ("policy", "kl", "accuracy")] == [-0.5, 0.25, 0.75]


def test_seconds_left_go_by_the_whole_run(tmp_path, clock):
    with Log(tmp_path, 100, 2, None, 10, dict) as log:
        for step, seconds in ((11, 90), (12, 1), (13, 4), (14, 4)):
            clock.now += seconds
            log.step(step, _metrics(), [], 0.0)
    last = _lines(tmp_path)[-1]
    assert last["seconds_left"] == pytest.approx((1 + 4 + 4) / 3 * 86)
    assert last["tokens_per_s"] == pytest.approx(200 / 8)


def test_tensorboard_has_what_the_lines_have(tmp_path, clock):
    _run(tmp_path, clock, 5)
    lines = [
        (line["step"], name, np.float32(value))
        for line in _lines(tmp_path)
        for name, value in line.items()
        if name != "step"
    ]
    assert sorted(_logged(tmp_path)) == sorted(lines)


def test_a_full_disk_is_reported_with_the_name_of_the_log(tmp_path, clock):
    with Log(tmp_path, 5, 1, 1e6, 0, dict) as log:
        with full_disk(at=20), pytest.raises(OSError, match=f"'{tmp_path / METRICS}'"):
            log.step(1, _metrics(), [["a"]], flops=3e5)


def test_progress_is_logged(tmp_path, clock, caplog):
    caplog.set_level("INFO", logger="absl")
    _run(tmp_path, clock, 4, total=5000)
    assert caplog.messages[-1] == (
        "step 4/5000  loss 3.5  understanding 2  generation 2  grad_norm 0.5  learning_rate 0.25"
        "  packing_efficiency 0.7812  50 tokens/s  MFU 15.0%  2:46:32 left"
    )


def test_what_is_skipped_is_reported_when_it_has_changed(tmp_path, caplog):
    caplog.set_level("INFO", logger="absl")
    counts = {}
    with Log(tmp_path, 9, 2, None, 0, lambda: dict(counts)) as log:
        log.step(1, _metrics(), [], 0.0)
        counts["a/b"] = {"missing file": 12, "empty text": 1}
        for step in (2, 3, 4):  # unchanged at 4, and no line at 3
            log.step(step, _metrics(), [], 0.0)
        log.skipped(4, {}, "eval/skipped")
        counts["c"] = {"malformed": 1}
        for step in (5, 6):
            log.step(step, _metrics(), [], 0.0)
        log.skipped(6, {"": {"malformed": 2}}, "eval/skipped")
    first = {"skipped/a/b/missing_file": 12, "skipped/a/b/empty_text": 1}
    assert [line for line in _lines(tmp_path) if "loss" not in line] == [
        {"step": 2, **first},
        {"step": 6, **first, "skipped/c/malformed": 1},
        {"step": 6, "eval/skipped/malformed": 2},
    ]
    message = "step 2/9  skipped/a/b/missing_file 12  skipped/a/b/empty_text 1"
    assert caplog.messages.count(message) == 1
    logged = {name for _, name, _ in _logged(tmp_path)}
    assert {*first, "skipped/c/malformed", "eval/skipped/malformed"} <= logged


def test_a_resumed_run_takes_out_what_came_after_its_checkpoint(tmp_path, clock):
    _run(tmp_path, clock, 5)
    kept = _lines(tmp_path)[:2]
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 1, "lo')  # killed while writing a line
    _run(tmp_path, clock, 3, start=2)
    lines = _lines(tmp_path)
    assert lines[:2] == kept
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert "tokens_per_s" not in lines[2] and "tokens_per_s" in lines[3]
    starts = [event.step for event in _events(tmp_path) if event.session_log.status]
    assert starts == [1, 3]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [METRICS]


def test_a_log_that_needs_no_cut_is_left_as_it_is(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    before = path.stat()
    with Log(tmp_path, 5, 1, None, 2, dict):
        pass
    after = path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(loss=float("nan")),
        dict(grad_norm=float("inf")),
        dict(param_norm=float("inf")),
        dict(sums=(float("nan"), 0.0, 6.0)),
    ],
)
def test_a_loss_or_norm_that_is_not_finite_stops_with_step_and_records(tmp_path, wrong):
    no_utf_8 = "b:\udce9"  # a file name need not be UTF-8
    records = [[f"a:{number}" for number in range(6)], ["b:0", "b:1", no_utf_8], []]
    with Log(tmp_path, 9, 1, None, 0, dict) as log:
        log.step(1, _metrics(), [], 0.0)
        with pytest.raises(FloatingPointError) as raised:
            log.step(2, _metrics(**wrong), records, 0.0)
    message = str(raised.value)
    ((name, value),) = wrong.items()
    expected = "understanding nan" if name == "sums" else f"{name} {value}"
    assert expected in message and "generation 2 " in message
    listed = tmp_path / "not_finite-2-000.txt"
    shown = "a:0, a:1, a:2, a:3, a:4, a:5, b:0, b:1 and 1 more"
    assert re.search(rf"step 2\b.*: {shown}; .*{listed}$", message)
    assert listed.read_text("utf-8", "surrogateescape").split() == [*records[0], *records[1]]
    assert "\n" not in message
    assert [line["step"] for line in _lines(tmp_path)] == [1]


def test_other_processes_check_and_write_nothing_but_their_bad_records(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with Log(tmp_path / "run", 2, 1, None, 0, dict) as log:
        log.step(1, _metrics(), [], 0.0)
        log.scalars(1, {"loss": 1.0}, "eval")
        log.images(1, "prompts", np.zeros((1, 2, 2, 3), np.uint8))
        log.text(1, "answers", "a cat")
        assert not (tmp_path / "run").exists()
        message = r"step 2\b.*: c:3; .*not_finite-2-001\.txt"
        with pytest.raises(FloatingPointError, match=message):
            log.step(2, _metrics(loss=float("nan")), [["c:3"]], 0.0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["not_finite-2-001.txt"]


def test_scalars_images_and_texts_are_there_under_their_names(tmp_path):
    images = np.zeros((2, 4, 6, 3), np.uint8)
    with Log(tmp_path, 9, 1, None, 0, dict) as log:
        log.scalars(3, {"loss": 0.5, "text": np.float32(0.25)}, "eval")
        log.images(3, "prompts", images)
        log.text(3, "answers", "a cat")
        with pytest.raises(FloatingPointError, match=r"eval/loss nan.*\b3\b"):
            log.scalars(3, {"loss": float("nan")}, "eval")
    assert _lines(tmp_path) == [{"step": 3, "eval/loss": 0.5, "eval/text": 0.25}]
    assert _logged(tmp_path) == [(3, "eval/loss", 0.5), (3, "eval/text", 0.25)]
    values = {value.tag: value for event in _events(tmp_path) for value in event.summary.value}
    assert values["prompts"].image.height == 4
    assert values["prompts"].image.width == 12  # side by side
    assert values["answers/text_summary"].tensor.string_val[0] == b"a cat"


def _small() -> JanusConfig:
    """A decoder of 2 layers, width 8, 2 heads, MLP 12, 20 tokens; SigLIP of width 8, 4 patches."""
    tiny = JanusConfig.janus_tiny()
    return dataclasses.replace(
        tiny,
        und_encoder=dataclasses.replace(
            tiny.und_encoder, image_size=32, width=8, num_layers=1, num_heads=2, mlp_dim=12
        ),
        gen_head_width=10,
        language_model=dataclasses.replace(
            tiny.language_model, vocab_size=20, hidden_size=8, intermediate_size=12,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return nnx.merge(*abstract(_small()))


# parameters of the matrices of _small, counted by hand
_LAYER = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12  # q, o; k, v of one head; gate, up, down
_BLOCK = 4 * 8 * 8 + 2 * 8 * 12
_PATCH_EMBED = 16 * 16 * 3 * 8
_UND_ALIGNER = 8 * 8 + 8 * 8


def _flops(model, part: str) -> StepFlops:
    _, params, frozen = nnx.split(model, lambda path, _: path[0] in part.split(), ...)
    return step_flops(_small(), dict(leaves_by_path(params)), dict(leaves_by_path(frozen)))


def test_all_trained_costs_three_times_forward_but_for_the_first_input(small):
    cost = _flops(small, "und_encoder und_aligner gen_embed gen_aligner gen_head language_model")
    assert cost.token == 3 * 2 * 2 * _LAYER
    assert cost.pair == 3 * 2 * 4 * 8
    towers = 3 * 2 * _BLOCK + 2 * 2 * _PATCH_EMBED + 3 * 4 * 8 * 4
    assert cost.patch == towers + 3 * 2 * _UND_ALIGNER
    assert cost.generated == 3 * 2 * (16 * 8 + 8 * 8)
    assert cost.text_target == 3 * 2 * 8 * 20
    assert cost.image_target == 3 * 2 * (8 * 10 + 10 * 1024)


def test_frozen_parts_cost_no_gradient_of_their_own(small):
    cost = _flops(small, "und_aligner gen_aligner gen_head")
    assert cost.token == 2 * 2 * 2 * _LAYER
    assert cost.pair == 3 * 2 * 4 * 8
    forward = 2 * _BLOCK + 2 * _PATCH_EMBED + 4 * 8 * 4
    assert cost.patch == forward + 2 * 2 * _UND_ALIGNER + 2 * 8 * 8
    assert cost.text_target == 2 * 2 * 8 * 20
    head_only = _flops(small, "gen_head")
    assert head_only.token == 2 * 2 * _LAYER
    assert head_only.pair == 2 * 4 * 8


def test_rows_cost_what_they_hold_and_padding_nothing():
    cost = StepFlops(1e0, 1e2, 1e4, 1e5, 1e6, 1e7)
    rows = dict(
        segment_ids=np.array([[1, 1, 1, 2, 2, 0, 0]]),
        positions=np.array([[0, 1, 2, 0, 1, 0, 1]]),
        image_mask=np.array([[0, 1, 1, 0, 0, 0, 0]], bool),
        gen_mask=np.array([[0, 0, 0, 0, 1, 0, 0]], bool),
        loss_mask=np.array([[0, 0, 0, 1, 0, 0, 0]], bool),
    )
    # 5 tokens; 1 + 2 + 3 and 1 + 2 pairs; 2 patches; 1 generated token and target; 1 text target
    assert cost(rows) == 5 + 9e2 + 2e4 + 1e5 + 1e6 + 1e7


def test_a_parameter_of_no_known_part_is_refused(small):
    _, params, frozen = nnx.split(small, lambda path, _: path[0] == "gen_head", ...)
    frozen["other"] = frozen["gen_embed"]
    with pytest.raises(ValueError, match=r"other\.embedding"):
        step_flops(_small(), dict(leaves_by_path(params)), dict(leaves_by_path(frozen)))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_peak_goes_by_the_kind_of_device(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
