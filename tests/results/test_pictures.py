"""Where images, rules and ticks lie in the pictures."""

import csv
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsfvae.results import pictures, run_figures
from fastsfvae.training.config import TrainConfig

pytest.importorskip("matplotlib")


def drawn(figure):
    """Render a figure, so that its layout is final."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


@pytest.mark.parametrize("size, rule", [((28, 28), (1, 1)), ((32, 64), (1, 2)), ((64, 64), (2, 2))])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_between_grey_rules(size, rule, channels):
    (h, w), (down, across) = size, rule
    images = torch.rand(6, channels, h, w)
    images[1:3] = torch.tensor([0.0, 1.0])[:, None, None, None]
    sheet = pictures._tile(images, 3)
    assert sheet.shape[:2] == (2 * h + down, 3 * w + 2 * across)
    seen = np.ones(sheet.shape[:2], dtype=bool)
    for i, image in enumerate(images):
        top, left = i // 3 * (h + down), i % 3 * (w + across)
        found = sheet[top : top + h, left : left + w].reshape(h, w, channels)
        np.testing.assert_array_equal(found, image.permute(1, 2, 0).numpy())
        seen[top : top + h, left : left + w] = False
    # All the rest is rule, and seen between a black and a white image.
    assert seen.any() and np.ptp(sheet[seen]) == 0
    assert 0.2 < sheet[seen].max() < 0.8


def test_the_place_of_a_missing_image_is_white():
    images = torch.zeros(4, 1, 28, 28)
    images[1] = torch.nan
    images[2, 0, 0, 0] = torch.nan
    sheet = pictures._tile(images, 2)
    assert (sheet[:29, 29:] == 1).all() and 0.2 < sheet[5, 28] < 0.8
    # An image that is broken in part is shown, and so is its rule.
    assert np.isnan(sheet[29, 0]) and sheet[30, 0] == 0 and 0.2 < sheet[30, 28] < 0.8


def test_ticks_stand_at_the_middles_of_their_images():
    rows = {name: torch.rand(4, 1, 28, 28) for name in ("first", "second", "third")}
    (axes,) = drawn(pictures.rows_of_images(rows)).axes
    # Pixel i of a sheet lies around i: rows of 28 with a rule of one in between.
    assert axes.get_yticks().tolist() == [13.5, 42.5, 71.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)

    def decoder(z):
        return z[:, :1, None, None].expand(-1, 1, 8, 8)

    # Long names have their place.
    narrow = pictures.rows_of_images({"a rather long name of a run: f(z)": torch.rand(1, 1, 8, 8)})
    (axes,) = drawn(narrow).axes
    assert axes.get_window_extent().width > 10

    kl = [0.1, 0.7, 0.4]
    (axes,) = drawn(pictures.traversals(decoder, torch.zeros(3), kl, steps=5)).axes
    assert axes.get_xticks().tolist() == [3.5, 21.5, 39.5]
    assert axes.get_yticks().tolist() == [3.5, 12.5, 21.5]
    assert "z_{2}" in axes.get_yticklabels()[0].get_text()
    assert axes.get_xlabel() and "KL" in axes.get_ylabel()


def test_an_image_of_the_plane_lies_at_its_z():
    def decoder(z):
        # White at (limit, limit) alone.
        corner = (z == 3.0).all(1).float()
        return corner[:, None, None, None].expand(-1, 1, 28, 28)

    (axes,) = drawn(pictures.manifold(decoder, torch.device("cpu"), count=4, limit=3.0)).axes
    (image,) = axes.images
    left, right, bottom, top = image.get_extent()
    assert (left, bottom) == (-right, -top) and right == top
    sheet = np.asarray(image.get_array())
    height, width = sheet.shape
    rows, columns = np.nonzero(sheet == 1)
    # Half a pixel, as the first one begins at the edge.
    x = left + (columns.mean() + 0.5) / width * (right - left)
    y = top - (rows.mean() + 0.5) / height * (top - bottom)
    assert (x, y) == pytest.approx((3.0, 3.0), rel=1e-12)


@pytest.mark.parametrize("points, shown", [(1, True), (20, True), (21, False)])
def test_curves_of_few_points_show_them(tmp_path, points, shown):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "objective", "kl", "squared_error"])
        writer.writerows([i, -i, i, math.sqrt(i)] for i in range(points))
    run = SimpleNamespace(folder=tmp_path, config=TrainConfig(method="sampling"))
    for axes in drawn(run_figures._curves(run)).axes:
        (line,) = axes.lines
        assert (line.get_marker() not in ("", "None")) == shown
        assert len(line.get_xdata()) == points
