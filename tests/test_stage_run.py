"""Runs of a stage: checkpoints, stopping, resuming and the written model."""

import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image
from stage_configs import SMALL, make_program, small_config, train_stage

import janus_jax
from janus_jax.generation.pipeline import Pipeline
from janus_jax.interop import load
from janus_jax.interop.load import open_folder
from janus_jax.interop.stored import stored_params
from janus_jax.training.checkpoints import Checkpoints
from janus_jax.training.evaluation import prompt_images
from janus_jax.training.metrics import Log
from janus_jax.training.run import lock_folder

pytestmark = pytest.mark.usefixtures("quick_compiles")


def weights(folder):
    stored = stored_params(open_folder(folder))
    return {path: stored.read(path) for path in stored.metadata}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.fixture(scope="module")
def calls() -> dict[str, int]:
    """How often the run of `whole` called each of some functions."""
    return {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, calls):
    """An uninterrupted run of four steps."""
    output = tmp_path_factory.mktemp("whole")
    with (
        mock.patch.object(optax, "adamw", wraps=optax.adamw) as adamw,
        mock.patch.object(load, "read_config", wraps=load.read_config) as read_config,
    ):
        train_stage(small_config(output))
    calls.update(adamw=adamw.call_count, read_config=read_config.call_count)
    return output


def test_a_run_builds_one_optimizer_and_opens_its_checkpoint_once(whole, calls):
    assert calls == dict(adamw=1, read_config=1)


def test_what_trains_changes_and_the_rest_is_as_it_was(whole):
    before, after = weights(SMALL), weights(whole / "model")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.split(".")[0] for path in before.keys() - changed} == {"gen_vq"}
    assert not any(path.startswith("gen_vq") for path in changed)
    assert {"und_encoder.pos_embed", "gen_embed.embedding"} <= changed


def test_sigterm_saves_and_the_run_resumes_to_the_same_weights(whole, tmp_path, monkeypatch):
    log_step = Log.step

    def log_and_stop(log, step, *rest):
        log_step(log, step, *rest)
        if step == 1:  # logged while step 2 runs
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "step", log_and_stop)
    before = signal.getsignal(signal.SIGTERM)
    train_stage(small_config(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "model").exists()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    monkeypatch.undo()
    train_stage(small_config(tmp_path, steps=2))  # writes the model of the stopped run
    assert (tmp_path / "model").exists() and len(lines(tmp_path)) == 2
    train_stage(small_config(tmp_path))
    assert_same(weights(tmp_path / "model"), weights(whole / "model"))
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_finished_run_is_not_run_again(whole):
    before = weights(whole / "model"), lines(whole)
    train_stage(small_config(whole))
    assert_same(weights(whole / "model"), before[0])
    assert lines(whole) == before[1]


def test_a_loss_that_is_nan_stops_the_run_and_spares_the_checkpoint(tmp_path):
    """The first step has learning rate 0, so its checkpoint has the initial weights."""
    large = dict(trained=r"language_model\.layers\.1\.", learning_rate=1e30)
    config = small_config(tmp_path, **large, warmup_steps=1, save_every=1)
    message = r"step 2\b.*: scenes:\w+:\d+, "
    with pytest.raises(FloatingPointError, match=message):
        train_stage(config)
    listed = (tmp_path / "not_finite-2-000.txt").read_text().splitlines()
    assert len(listed) > 3 and all(line.startswith("scenes:") for line in listed)
    program = make_program(config)
    with Checkpoints(tmp_path / "checkpoints", 3) as checkpoints:
        assert checkpoints.newest == 1
        state, _ = checkpoints.restore(program.abstract_state)
    assert int(state.step) == 1
    assert_same(state.params, program.parameters.load_trained())
    assert not (tmp_path / "model").exists()


def test_the_newest_checkpoints_are_kept_and_each_is_good_to_continue_from(whole, tmp_path):
    """The arrays of step 3 are donated to step 4 while they are being saved."""
    config = small_config(tmp_path, save_every=1, keep=2)
    train_stage(config)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["3", "4"]
    shutil.rmtree(checkpoints / "4")
    train_stage(config)
    assert_same(weights(tmp_path / "model"), weights(whole / "model"))


def test_a_run_does_not_go_back_nor_write_over_what_it_begins_with(whole):
    rule = r"steps.*\b4\b.* 3\b"
    with pytest.raises(ValueError, match=rule):
        train_stage(small_config(whole, steps=3))
    with pytest.raises(ValueError, match=f"init.*{whole / 'model'}"):
        train_stage(small_config(whole, init=str(whole / "model")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(trained=r"gen_head\."), r"trained \(\?!gen_vq\\\.\) -> gen_head"),
        (dict(learning_rate=2e-3), r"learning_rate 0\.001 -> 0\.002"),
        (dict(seed=1), "seed 0 -> 1"),
    ],
)
def test_a_run_resumes_with_the_settings_it_began_with(whole, changed, message):
    rule = "settings.*run.json.*"
    with pytest.raises(ValueError, match=rule + message):
        train_stage(small_config(whole, steps=5, **changed))


def test_sampling_comes_after_saving(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no answer")

    monkeypatch.setattr(Pipeline, "answer", fails)
    asked = dict(sample_every=2, save_every=2, questions=(("docs/scene.png", "What is it?"),))
    with pytest.raises(ValueError, match="no answer"):
        train_stage(small_config(tmp_path, prompts=(), **asked))
    with Checkpoints(tmp_path / "checkpoints", 3) as checkpoints:
        assert checkpoints.newest == 2


def test_an_image_that_cannot_be_read_is_reported_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"image.*README\.md"):
        asked = dict(sample_every=2, questions=(("README.md", "What is it?"),))
        train_stage(small_config(tmp_path, **asked))
    assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(prompts=("a", " ")), "prompt.*' '"),
        (dict(prompts=("a " * 5000,)), r"\b512 tokens"),
        (dict(questions=(("docs/scene.png", "a " * 5000),)), r"\b512 tokens"),
    ],
)
def test_what_cannot_be_sampled_is_reported_before_the_first_step(tmp_path, asked, message):
    program = make_program(small_config(tmp_path, sample_every=2, **asked))
    with pytest.raises(ValueError, match=message):
        prompt_images(program.inputs)


def test_settings_may_be_mended_until_something_is_saved(tmp_path):
    missing = dict(sample_every=1, questions=(("no/image.png", "What is it?"),))
    with pytest.raises(FileNotFoundError, match=r"no/image\.png"):
        train_stage(small_config(tmp_path, **missing))
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0  # the run was started
    train_stage(small_config(tmp_path, seed=1))
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 1


def test_a_run_does_not_write_over_what_is_no_runs(whole, tmp_path):
    (tmp_path / "model").mkdir()
    rule = f"output.*run.json.*checkpoints.*{tmp_path}"
    with pytest.raises(ValueError, match=rule):
        train_stage(small_config(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"athlete": "J. Doe"}')
    with pytest.raises(ValueError, match=rule):
        train_stage(small_config(tmp_path / "other"))
    assert (tmp_path / "other" / "run.json").read_text() == '{"athlete": "J. Doe"}'
    program = make_program(small_config(whole, trained=r"gen_head\."))
    with Checkpoints(whole / "checkpoints", 3) as checkpoints:
        with pytest.raises(ValueError, match=r"\b4 .*match.*config"):
            checkpoints.restore(program.abstract_state)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with lock_folder(tmp_path / "new"):
        with pytest.raises(ValueError, match=f"^{tmp_path}/new .*another run"):
            train_stage(small_config(tmp_path / "new"))
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    with lock_folder(tmp_path / "new"):  # unlocked again
        pass


def test_a_moving_average_is_what_is_written(tmp_path):
    trained = r"language_model\.layers\.0\."
    config = small_config(tmp_path, ema_decay=0.75, trained=trained, steps=2, save_every=1)
    program, path = make_program(config), "language_model.layers.0.mlp.up_proj.kernel"

    def newest():
        """Returns (parameter, moving average) of the newest checkpoint."""
        with Checkpoints(tmp_path / "checkpoints", 3) as checkpoints:
            state, _ = checkpoints.restore(program.abstract_state)
        return np.asarray(state.params[path]), np.asarray(state.ema[path])

    train_stage(config)
    param, average = newest()
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    param_before, average_before = newest()
    first = stored_params(program.inputs.source).read(path)
    mean = 0.75 * first + 0.25 * param_before
    np.testing.assert_allclose(average_before, mean, rtol=1e-6)
    np.testing.assert_allclose(average, 0.75 * average_before + 0.25 * param, rtol=1e-6)
    assert not np.array_equal(param_before, param) and not np.array_equal(param, average)
    np.testing.assert_array_equal(weights(tmp_path / "model")[path], average)
    train_stage(config)  # resumes from step 1
    np.testing.assert_array_equal(newest(), (param, average))


def test_held_out_losses_images_and_answers_at_intervals(tmp_path):
    config = small_config(
        tmp_path,
        steps=2,
        trained=r"gen_head\.",
        accumulate=2,
        remat="dots",
        ema_decay=0.5,
        eval_every=2,
        eval_batches=2,
        sample_every=2,
        prompts=("a small scene", "a red circle"),
        questions=(("docs/scene.png", "What is it?"),),
    )
    config.eval_mixture = ConfigDict(
        dict(generation=dict(format="scenes", path="generation", seed=7, count=100))
    )
    train_stage(config)
    (held_out,) = (line for line in lines(tmp_path) if "eval/generation" in line)
    assert held_out["step"] == 2 and held_out.keys() == {"step", "eval/generation"}
    folder = tmp_path / "samples" / "0000002"
    images = [np.asarray(Image.open(folder / f"prompt-{number}.png")) for number in (0, 1)]
    assert images[0].shape == (64, 64, 3) and not np.array_equal(*images)
    assert (folder / "answers.txt").read_text().startswith("docs/scene.png: What is it? -> ")
    # The written model generates the same images. It is loaded without a mesh, for which XLA
    # compiles another program, so that a pixel may be rounded to the next value.
    janus = janus_jax.load(tmp_path / "model", dtype="float32")
    pixels = janus.generate_images(list(config.prompts), seed=config.seed).pixels
    np.testing.assert_allclose(pixels.astype(int), np.asarray(images, int), rtol=0, atol=1)


def test_the_held_out_loss_is_that_of_the_same_rows_each_time(tmp_path):
    still = dict(trained=r"gen_head\.", learning_rate=0.0, end_learning_rate=0.0)
    config = small_config(tmp_path, steps=2, eval_every=1, **still)
    config.eval_mixture = config.mixture
    train_stage(config)
    found = [line for line in lines(tmp_path) if "eval/text" in line]
    assert len(found) == 2 and found[0] == found[1] | dict(step=1)


def test_what_was_skipped_is_reported_and_forgotten_by_a_run_that_restarts(tmp_path):
    data, listed = tmp_path / "said.jsonl", tmp_path / "run" / "skipped-000.jsonl"
    held_out = tmp_path / "run" / "eval" / "skipped-000.jsonl"
    data.write_text('{"text": "a word"}\n' * 20 + "{\n" + '{"text": ""}\n')
    held_out.parent.mkdir(parents=True)
    mended = dict(source="text", record=f"{data}:1", reason="malformed", detail="")
    for path in (listed, held_out):
        path.write_text(json.dumps(mended) + "\n")
    trained = r"gen_head\."
    config = small_config(tmp_path / "run", steps=1, trained=trained, eval_every=1, eval_batches=1)
    config.mixture = ConfigDict(dict(text=dict(format="jsonl", path=str(data))))
    config.eval_mixture = config.mixture
    train_stage(config)
    first, *others = lines(tmp_path / "run")
    assert 0.5 < first["packing_efficiency"] <= 1
    found = {"skipped/text/malformed": 1, "skipped/text/empty_text": 1}
    assert {"step": 1, **found} in others
    assert {"step": 1, **{f"eval/{name}": number for name, number in found.items()}} in others
    records = [json.loads(line)["record"] for line in listed.read_text().splitlines()]
    assert sorted(records) == [f"{data}:21", f"{data}:22"]
