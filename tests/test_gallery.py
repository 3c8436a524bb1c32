"""Tests of the files of generated images: names, contact sheets and atomic writes."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from janus_jax.commands import gallery
from janus_jax.paths import atomic_write


def test_what_is_made_otherwise_has_another_name():
    stems = [
        gallery.file_stem(prompt, 0, [dict(prompt=prompt, model=model, settings=settings)])
        for prompt in ("a" * 50, "a" * 50 + "b")
        for model in ("one/model", "other/model")
        for settings in ("{}", '{"temperature": 0.5}')
    ]
    assert len(set(stems)) == 8 and len({stem[:46] for stem in stems}) == 1
    made = [dict(prompt="a" * 50, model="one/model", settings="{}")]
    assert gallery.file_stem("a" * 50, 0, made) == stems[0]


def test_a_sheet_of_many_images_is_at_most_4096_pixels_wide():
    pixels = np.random.default_rng(0).integers(0, 256, (100, 50, 50, 3), np.uint8)
    sheet = gallery.contact_sheet(pixels, 100)
    assert sheet.shape == (4 + 40, 100 * 40 + 4, 3)
    np.testing.assert_array_equal(gallery.contact_sheet(pixels[:1], 1)[4:-4, 4:-4], pixels[0])


def test_many_prompts_take_several_sheets(tmp_path):
    prompts = [f"p{i}" for i in range(130)]
    pixels = np.zeros((260, 60, 60, 3), np.uint8)
    pixels[2 * 64] = 255
    shown = gallery.Gallery(tmp_path, prompts, 2, 0, lambda *_: {"model": "a"})
    shown.add(pixels[:3])
    shown.add(pixels[3:])
    shown.save_sheets()
    found = [re.sub("[0-9a-f]{6}-", "", path.name) for path in shown.paths[260:]]
    assert found == [f"prompts-seed0-sheet-{i:02d}.png" for i in range(3)]
    sheets = [Image.open(path) for path in shown.paths[260:]]
    assert [sheet.height for sheet in sheets] == [64 * 64 + 4, 64 * 64 + 4, 2 * 64 + 4]
    assert [sheet.text["prompt"].count("\n") for sheet in sheets] == [63, 63, 1]
    assert sheets[1].text["prompt"].startswith("p64\n")
    np.testing.assert_array_equal(np.asarray(sheets[1])[4:64, 4:64], pixels[128])


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a.png") as file:
        file.write(b"half")
        _ = 1 / 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


def test_who_may_read_a_file_is_as_the_user_has_it(tmp_path):
    before = os.umask(0o077)
    try:
        with atomic_write(tmp_path / "a.png") as file:
            file.write(b"mine")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o600
