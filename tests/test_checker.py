"""Tests of the checker on rendered, blurred and deliberately wrong images."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from janus_jax.shapes import checker, scenes

RED_CIRCLE = scenes.Object("circle", "red", 28, 24, 48)
BLUE_SQUARE = scenes.Object("square", "blue", 28, 72, 48)
TWO = scenes.Scene("white", (RED_CIRCLE, BLUE_SQUARE))
LEFT = scenes.Requirement(
    (scenes.Item("circle", "red"), scenes.Item("square", "blue")), "left of"
)


@pytest.fixture(scope="module")
def drawn():
    """Returns 600 (image, scene, requirement) of all kinds; one in six is held out."""
    rng = np.random.default_rng(7)
    samples = [scenes.sample_scene(rng, None, "held_out" if i % 6 == 5 else "train")
               for i in range(600)]
    return [(scenes.draw(scene), scene, prompt.requirement) for scene, prompt in samples]


def blurred(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    soft = Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.2))
    noisy = np.asarray(soft, np.float32) + rng.normal(0, 8, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def judge(scene: scenes.Scene, requirement: scenes.Requirement) -> bool:
    return checker.satisfies(requirement, checker.detect(scenes.draw(scene)))


def test_clean_scenes_pass(drawn):
    passed = [checker.satisfies(need, checker.detect(image)) for image, _, need in drawn]
    assert np.mean(passed) >= 0.995


def test_blurred_noisy_scenes_pass(drawn):
    rng = np.random.default_rng(8)
    passed = [checker.satisfies(need, checker.detect(blurred(image, rng)))
              for image, _, need in drawn]
    assert np.mean(passed) >= 0.97


def test_detections_are_the_objects(drawn):
    for image, scene, _ in drawn[:200]:
        assert checker.background(image) == scene.background
        found = {(d.shape, d.color, d.x, d.y) for d in checker.detect(image)}
        assert len(found) == len(scene.objects)
        for item in scene.objects:
            assert any(d[:2] == (item.shape, item.color) and abs(d[2] - item.x) < 1.5
                       and abs(d[3] - item.y) < 1.5 for d in found)


def test_every_shape_color_size_background_is_recognized():
    for background in scenes.BACKGROUNDS:
        for shape in scenes.SHAPES:
            for color in scenes.COLORS:
                for size in scenes.SIZES:
                    scene = scenes.Scene(background, (scenes.Object(shape, color, size, 48, 44),))
                    (found,) = checker.detect(scenes.draw(scene))
                    assert (found.shape, found.color) == (shape, color)


def test_true_scene_passes():
    assert judge(TWO, LEFT)


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(RED_CIRCLE, color="orange"),
        dataclasses.replace(RED_CIRCLE, shape="triangle"),
        dataclasses.replace(RED_CIRCLE, x=72, y=14),  # above, not left of
    ],
)
def test_wrong_object_fails(wrong):
    assert not judge(scenes.Scene("white", (wrong, BLUE_SQUARE)), LEFT)


def test_swapped_places_and_swapped_colors_fail():
    mirrored = (dataclasses.replace(RED_CIRCLE, x=72), dataclasses.replace(BLUE_SQUARE, x=24))
    recolored = (dataclasses.replace(RED_CIRCLE, color="blue"),
                 dataclasses.replace(BLUE_SQUARE, color="red"))
    both = dataclasses.replace(LEFT, relation=None)
    assert not judge(scenes.Scene("white", mirrored), LEFT)
    assert judge(scenes.Scene("white", mirrored), both)
    assert not judge(scenes.Scene("white", recolored), both)


def test_extra_and_missing_objects_fail():
    extra = scenes.Object("cross", "green", 24, 48, 80)
    assert not judge(scenes.Scene("white", (*TWO.objects, extra)), LEFT)
    assert not judge(scenes.Scene("white", (RED_CIRCLE,)), LEFT)
    assert not judge(scenes.Scene("white", ()), LEFT)


@pytest.mark.parametrize("required", [2, 3, 4])
def test_wrong_count_fails(required):
    places = [(24, 24), (72, 24), (24, 72), (72, 72)]
    triangles = [scenes.Object("triangle", "green", 24, x, y) for x, y in places]
    need = scenes.Requirement((scenes.Item("triangle", None, required),))
    for drawn_count in range(1, 5):
        scene = scenes.Scene("black", tuple(triangles[:drawn_count]))
        assert judge(scene, need) == (drawn_count == required)


def test_colorless_and_two_colored_blobs_have_no_name():
    image = np.full((96, 96, 3), 255, np.uint8)
    image[20:44, 20:44] = 90
    image[60:84, 20:32] = (222, 32, 44)
    image[60:84, 32:44] = (36, 84, 224)
    assert [d.color for d in checker.detect(image)] == [checker.UNKNOWN] * 2


def test_squares_that_touch_at_a_corner_are_two_objects_in_the_order_of_their_first_pixels():
    image = np.full((96, 96, 3), 255, np.uint8)
    image[44:68, 20:44] = (222, 32, 44)  # below and to the left of the other
    image[20:44, 44:68] = (36, 84, 224)
    found = [(d.shape, d.color, d.area) for d in checker.detect(image)]
    assert found == [("square", "blue", 576), ("square", "red", 576)]


def test_u_shaped_blob_is_one_component_without_a_shape_name():
    image = np.full((96, 96, 3), 255, np.uint8)
    image[20:60, 20:26] = image[20:60, 54:60] = image[54:60, 20:60] = (222, 32, 44)
    (found,) = checker.detect(image)
    assert (found.shape, found.color) == (checker.UNKNOWN, "red")


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="expected uint8"):
        checker.detect(np.zeros((96, 96, 3), np.float32))
    point = checker.Detection("circle", "red", 0.0, 0.0, 100)
    with pytest.raises(ValueError, match="got 'near'"):
        checker.holds("near", point, point)
