"""Pictures of states: every factor shows, where geometry puts it and in its colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyrocausal.errors import DataError
from pyrocausal.simulate_raster import rasterise
from pyrocausal.simulate_tc3di import CIRC


def draws(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(seed).uniform(CIRC.low, CIRC.high, (n, 9)), np.arange(n) % 7


def colour(hue: float, centre: float, amplitude: float) -> np.ndarray:
    return centre + amplitude * np.cos(hue - 2 * np.pi * np.arange(3) / 3)


def test_every_factor_changes_pixels_and_nothing_else_does() -> None:
    c, shape = draws(42)
    c[:, :3] *= 0.9
    image = rasterise(c, shape)
    assert image.shape == (42, 48, 48, 3) and image.min() >= 0 and image.max() <= 1
    np.testing.assert_array_equal(image, rasterise(c, shape))
    np.testing.assert_array_equal(image[29:31], rasterise(c[29:31], shape[29:31]))  # an image depends on its own state alone
    for k in range(9):
        other = c.copy()
        other[:, k] += 0.15 if k < 3 else 0.3
        assert np.abs(rasterise(other, shape) - image).max((1, 2, 3)).min() > 0.05
    assert np.abs(rasterise(c, (shape + 1) % 7) - image).max((1, 2, 3)).min() > 0.1
    assert np.abs(rasterise(c + 2 * np.pi * CIRC.angle, shape) - image).max() < 1e-3
    box = c / np.repeat([2, np.pi / 2], [3, 6])
    assert np.abs(rasterise(box, shape, box=True) - image).max() < 1e-3


def test_pictures_show_what_the_state_says() -> None:
    """Colours of the ground, of the dot, of the arc's middle and of the light and dark halves, where geometry puts them."""
    p = 192
    c, _ = draws(60, seed=2)
    c[:, 1] = np.abs(c[:, 1])  # bodies of more than 40 pixels
    image = rasterise(c, n_pixels=p)

    def at(i: int, right: float, up: float) -> np.ndarray:
        return image[i, int((1 - up) / 2 * p), int((right + 1) / 2 * p)]

    for i, (x, y, z, alpha, beta, spot, hue_obj, hue_spot, hue_back) in enumerate(c):
        s = 0.42 * (1 + 0.17 * y)
        for corner in (image[i, 0, 0], image[i, 0, -1], image[i, -1, 0], image[i, -1, -1]):
            np.testing.assert_allclose(corner, colour(hue_back, 0.5, 0.3), atol=1e-3)
        np.testing.assert_allclose(at(i, 0.17 * x + 0.45 * s * np.cos(beta), 0.17 * z + 0.45 * s * np.sin(beta)), 1, atol=0.02)
        np.testing.assert_allclose(at(i, 0.17 * x + s * np.cos(spot), 0.17 * z + s * np.sin(spot)), colour(hue_spot, 0.5, 0.5), atol=0.05)
        for side, light in ((0, 1.0), (np.pi, 0.3)):
            angle = alpha + side
            if np.cos(angle - beta) < 0.5:  # away from the dot
                there = at(i, 0.17 * x + 0.42 * s * np.cos(angle), 0.17 * z + 0.42 * s * np.sin(angle))
                np.testing.assert_allclose(there, light * colour(hue_obj, 0.5, 0.5), atol=0.03)


def test_lobes_are_counted_by_the_shape() -> None:
    """The body is where the hue of the object shows; on a circle that the lobes cross its strongest frequency is their number."""
    c = np.zeros((7, 9))
    c[:, 1] = 2.0
    body = rasterise(c, np.arange(7), n_pixels=192)
    c[:, 6] = 2.0
    changed = np.abs(rasterise(c, np.arange(7), n_pixels=192) - body).max(-1) > 0.05
    s, angle = 0.42 * 1.34, np.linspace(0, 2 * np.pi, 720, endpoint=False)
    where = changed[:, ((1 - 0.8 * s * np.sin(angle)) * 96).astype(int), ((1 + 0.8 * s * np.cos(angle)) * 96).astype(int)]
    strength = np.abs(np.fft.rfft(where.astype(float), axis=1))[:, 1:]
    assert list(1 + strength.argmax(1)) == [1, 2, 3, 4, 5, 6, 8]


def test_a_ridge_recovers_positions() -> None:
    """From what differs from the corner, pooled over 2 x 2 pixels: out of sample R^2 above .8 (mixed shapes, free hues)."""
    c, shape = draws(2000, seed=5)
    image = rasterise(c, shape)
    differs = np.linalg.norm(image - image[:, :1, :1], axis=-1) > 0.1
    pooled = differs.reshape(-1, 24, 2, 24, 2).mean((2, 4)).reshape(2000, -1)
    train, test = slice(0, 1500), slice(1500, None)
    centre, mean = pooled[train].mean(0), c[train, :3].mean(0)
    F = pooled[train] - centre
    predicted = mean + (pooled[test] - centre) @ np.linalg.solve(F.T @ F + 10 * np.eye(576), F.T @ (c[train, :3] - mean))
    r2 = 1 - ((c[test, :3] - predicted) ** 2).sum(0) / ((c[test, :3] - c[test, :3].mean(0)) ** 2).sum(0)
    assert r2.min() > 0.8


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"state": np.zeros((3, 8))}, "state"), ({"state": np.full((2, 9), np.nan)}, "state"),
        ({"state": np.full((2, 9), 2.5)}, "position"), ({"state": np.full((2, 9), 1.5), "box": True}, "position"),
        ({"state": np.zeros((2, 9)), "shape": [0]}, "shape"), ({"state": np.zeros((2, 9)), "shape": [0, 7]}, "shape"),
        ({"state": np.zeros((2, 9)), "shape": [0.0, 1.0]}, "shape"), ({"state": np.zeros((2, 9)), "n_pixels": 20}, "n_pixels"),
        ({"state": np.zeros((2, 9)), "n_pixels": 64.0}, "n_pixels"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_drawn(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        rasterise(**wrong)
