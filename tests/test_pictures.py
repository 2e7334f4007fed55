import math

import numpy as np
import pytest
import torch

from sparserefine import Classes
from sparserefine.images.pictures import (
    BROKEN,
    MENDED,
    SITE,
    STILL_RIGHT,
    STILL_WRONG,
    UNKNOWN,
    changes,
    heat,
    labels_picture,
    overlay,
    shrink,
    side_by_side,
    sites_picture,
)

CLASSES = Classes(("background", "road", "car"), ((0, 0, 0), (128, 64, 128), (0, 0, 142)))
IMAGE = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def colour_at(picture, row, column):
    return tuple(picture[:, row, column].tolist())


def lightness(colours):
    """CIE L* of sRGB colours, ``uint8 [..., 3]``: what an eye calls lightness."""
    linear = np.asarray(colours) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)


def test_labels_have_the_colours_of_their_classes():
    labels = torch.tensor([[0, 1], [2, 255]])
    for dtype in (torch.uint8, torch.int16, torch.int64):
        picture = labels_picture(labels.to(dtype), CLASSES)
        assert picture.dtype == torch.uint8
        assert [colour_at(picture, i // 2, i % 2) for i in range(4)] == [*CLASSES.palette, UNKNOWN]


def test_small_labels_go_with_many_classes():
    assert colour_at(labels_picture(torch.tensor([[2]], dtype=torch.uint8), Classes.numbered(300)), 0, 0) == (0, 128, 0)


def test_label_255_is_a_class_where_there_are_as_many():
    classes = Classes.numbered(300)
    picture = labels_picture(torch.tensor([[255, 299, 300]], dtype=torch.int16), classes)
    assert [colour_at(picture, 0, i) for i in range(3)] == [classes.palette[255], classes.palette[299], UNKNOWN]


def test_overlay_blends_and_leaves_background_and_unknown_labels():
    labels = torch.zeros(6, 8, dtype=torch.uint8)
    labels[0, :4], labels[1] = 2, 255
    before = IMAGE.clone()
    picture = overlay(IMAGE, labels, CLASSES, alpha=0.25)
    assert torch.equal(IMAGE, before)
    assert torch.equal(picture[:, 1:], IMAGE[:, 1:])
    expected = 0.75 * IMAGE[:, 0, :4] + 0.25 * torch.tensor(CLASSES.palette[2])[:, None]
    assert (picture[:, 0, :4] - expected).abs().max() <= 0.5
    assert torch.equal(overlay(IMAGE, labels, CLASSES, alpha=0), IMAGE)


def test_overlay_of_a_high_image_is_that_of_its_parts():
    image = torch.randint(0, 256, (3, 700, 3), dtype=torch.uint8)
    labels = torch.randint(0, 4, (700, 3), dtype=torch.uint8)
    parts = [
        overlay(image[:, rows], labels[rows], CLASSES) for rows in (slice(0, 100), slice(100, 699), slice(699, 700))
    ]
    assert torch.equal(overlay(image, labels, CLASSES), torch.cat(parts, dim=1))


def test_overlay_blends_class_0_where_it_has_a_colour():
    classes = Classes(("sky", "road"), ((10, 20, 30), (0, 0, 0)))
    picture = overlay(IMAGE, torch.zeros(6, 8, dtype=torch.uint8), classes, alpha=1)
    assert torch.equal(picture, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 6, 8))


def test_images_may_be_floating_point():
    labels = torch.ones(6, 8, dtype=torch.uint8)
    assert torch.equal(overlay(IMAGE / 255, labels, CLASSES), overlay(IMAGE, labels, CLASSES))


def test_heat_grows_evenly_in_lightness_and_saturates():
    ramp = torch.linspace(0, 1, 256)[None]
    picture = heat(ramp * math.log(2), math.log(2))
    steps = lightness(picture[:, 0].t().numpy())
    assert (np.diff(steps) > -0.2).all()  # colours are whole numbers
    assert np.abs(steps - np.linspace(steps[0], steps[-1], 256)).max() < 7
    assert colour_at(picture, 0, 0) == (0, 0, 4)
    assert colour_at(picture, 0, 255) == colour_at(heat(torch.full((1, 1), 9.0), 1.0), 0, 0) == (252, 255, 164)
    assert colour_at(heat(torch.full((1, 1), -1.0), 1.0), 0, 0) == (0, 0, 4)


def test_heat_refuses_what_has_no_colour():
    with pytest.raises(ValueError, match="limit = 0"):
        heat(torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match="1 of 4 values"):
        heat(torch.tensor([[0, 1], [2, float("nan")]]), 1)


def test_sites_stand_out_of_a_dimmed_grey_image():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2, 3] = True
    picture = sites_picture(IMAGE, mask)
    assert colour_at(picture, 2, 3) == SITE
    rest = picture[:, ~mask]
    assert torch.equal(rest[0], rest[1])
    assert torch.equal(rest[1], rest[2])
    assert rest.max() <= 0.6 * 255
    assert lightness(SITE) > lightness((153, 153, 153)) + 15


def test_changes_are_told_apart():
    before = torch.tensor([[0, 1, 0, 1, 0]], dtype=torch.uint8)
    after = torch.tensor([[0, 0, 1, 2, 1]], dtype=torch.uint8)
    truth = torch.tensor([[0, 0, 0, 0, 255]])
    picture = changes(before, after, truth)
    assert [colour_at(picture, 0, i) for i in range(5)] == [STILL_RIGHT, MENDED, BROKEN, STILL_WRONG, (0, 0, 0)]


def test_mended_and_broken_differ_for_every_kind_of_colour_vision():
    # Dichromats: simulation of Vienot, Brettel and Mollon (1999) in linear RGB.
    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    mended, broken = np.array(MENDED) / 255, np.array(BROKEN) / 255
    for matrix in (np.eye(3), protan, deutan):
        seen = [np.clip(np.array(matrix) @ colour**2.2, 0, 1) ** (1 / 2.2) for colour in (mended, broken)]
        assert np.abs(seen[0] - seen[1]).max() > 0.5


def test_shrink_is_antialiased_and_never_enlarges():
    stripes = torch.zeros(3, 40, 80, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = shrink(stripes, 20)
    assert small.shape == (3, 10, 20)
    assert (small[:, :, 2:-2].float() - 127.5).abs().max() < 10  # sampled without a filter, it is 0 or 255
    assert torch.equal(shrink(stripes, 80), stripes)
    assert shrink(stripes[:, :1], 8).shape == (3, 1, 8)
    with pytest.raises(ValueError, match="longest = 0"):
        shrink(stripes, 0)


def block(value):
    """Where a sheet or picture shows the colour (value, 0, 0), which no caption has: top, left, height and width."""

    def of(sheet):
        rows, columns = ((sheet[0] == value) & (sheet[1] == 0)).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        return top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left

    return of


def red(value, height, width):
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    picture[0] = value
    return picture


def test_panels_lie_in_a_grid_with_their_pixels_magnified():
    pictures = [red(value, 6, 30) for value in (10, 20, 30)]
    pictures[0][0, 2, 5] = 200
    sheet = side_by_side([(str(i), picture) for i, picture in enumerate(pictures)], zoom=3, columns=2)
    first, second, third = (block(value)(sheet) for value in (10, 20, 30))
    assert first[2:] == second[2:] == third[2:] == (18, 90)
    assert first[0] == second[0] < third[0] - 18
    assert first[1] == third[1] < second[1] - 90
    assert block(200)(sheet) == (first[0] + 6, first[1] + 15, 3, 3)
    row = side_by_side([("", picture) for picture in pictures])
    assert len({block(value)(row)[0] for value in (10, 20, 30)}) == 1


def test_captions_stay_below_their_pictures():
    picture = red(150, 20, 120)
    words = "a caption that is far longer than its picture is wide and says so"
    plain, short, long = (side_by_side([(text, picture), ("", red(99, 20, 120))]) for text in ("", "word", words))
    assert plain.shape == short.shape
    assert long.shape[1] > short.shape[1]
    assert long.shape[2] == short.shape[2]
    top, left, height, width = block(150)(long)
    ink = ((long[0] == long[1]) & (long[0] < 100)).nonzero()
    assert len(ink)
    assert ink[:, 0].min() >= top + height
    assert ink[:, 0].max() < long.shape[1]
    assert ink[:, 1].min() >= left
    assert ink[:, 1].max() < left + width
    assert torch.equal(long[0, top : top + height, left : left + width], picture[0])


def test_panels_must_fit():
    picture = torch.zeros(3, 4, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="panel 'b' is 4x4 px, 'a' 5x4"):
        side_by_side([("a", picture), ("b", picture[:, :, :4])])
    with pytest.raises(ValueError, match="no panels"):
        side_by_side([])
    with pytest.raises(ValueError, match="zoom = 0"):
        side_by_side([("a", picture)], zoom=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: overlay(IMAGE, torch.zeros(1, 6, 8), CLASSES),
        lambda: overlay(IMAGE, torch.zeros(6, 7, dtype=torch.uint8), CLASSES),
        lambda: overlay(IMAGE[None], torch.zeros(6, 8, dtype=torch.uint8), CLASSES),
        lambda: overlay(IMAGE.int(), torch.zeros(6, 8, dtype=torch.uint8), CLASSES),
        lambda: sites_picture(IMAGE, torch.zeros(8, 6, dtype=torch.bool)),
        lambda: changes(torch.zeros(2, 2), torch.zeros(2, 3), torch.zeros(2, 2)),
    ],
)
def test_wrong_shapes_are_refused_with_what_was_expected(call):
    with pytest.raises(ValueError, match="expected"):
        call()
