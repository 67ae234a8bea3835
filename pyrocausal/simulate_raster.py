"""Small pictures of the states of Temporal Causal3DIdent: a stand-in for its ray-traced images that needs numpy alone.

In coordinates p = (right, up) of [-1, 1]^2, with ``q = p - .17 (x, z)``, ``s = .42 (1 + .17 y)``, theta and |q| the polar coordinates of q,
``soft(v) = 1 / (1 + exp(-v / w))`` with w half a pixel, and ``colour(h)_j = cos(h - 2 pi j / 3)`` for red, green and blue::

    ground    .5 + .3 colour(hue_back)
    body      (.5 + .5 colour(hue_obj)) (.65 + .35 tanh(6 q'(cos rot_alpha, sin rot_alpha) / s)),   |q| < s (.8 + .2 cos(k theta))
    dot       white,                           |q - .45 s (cos rot_beta, sin rot_beta)| < .15 s
    arc       .5 + .5 colour(hue_spot),        | |q| - s | < .12 s,   |theta - rot_spot| < .6

each laid softly over the ones before. The shape is the number of lobes k = 1, 2, 3, 4, 5, 6, 8, in the order of ``SHAPES``.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrocausal.errors import DataError

LOBES = np.array([1, 2, 3, 4, 5, 6, 8])
CHUNK = 64  # images at a time
LEAST = 48  # pixels a side at which the lobes of the smallest body are still apart
Image = NDArray[np.float32]


def rasterise(state: Any, shape: Any = None, n_pixels: int = 48, box: bool = False) -> Image:
    """Images [n, n_pixels, n_pixels, 3] of states, values in 0 to 1; rows run from the top, columns from the left, the last axis is RGB.

    Args:
        state: ``x, y, z`` within [-2, 2], then ``rot_alpha, rot_beta, rot_spot, hue_obj, hue_spot, hue_back`` in radians, [n, 9].
        shape: codes 0 to 6 of the shapes, [n]; all 0 if None.
        n_pixels: of a side; at least 48.
        box: the states are those of :func:`~pyrocausal.simulate_tc3di.tc3di_box`, in [-1, 1]^9: positions times 2, angles times pi / 2.

    Raises:
        DataError: for states, shapes or sizes that cannot be drawn.
    """
    c, code = _checked(state, shape, n_pixels, box)
    out = np.empty((len(c), n_pixels, n_pixels, 3), np.float32)
    side = ((2 * np.arange(n_pixels) + 1) / n_pixels - 1).astype(np.float32)
    for first in range(0, len(c), CHUNK):
        rows = slice(first, first + CHUNK)
        out[rows] = _draw(c[rows], LOBES[code[rows]], side)
    return out


def _draw(c: Image, lobes: NDArray[np.int64], side: Image) -> Image:
    """Images [n, p, p, 3] of states ``c`` [n, 9]; ``side`` [p] are the coordinates of the pixels' centres."""
    x, y, z, alpha, beta, spot, hue_obj, hue_spot, hue_back = (c[:, k, None, None] for k in range(9))
    s, w = 0.42 * (1 + 0.17 * y), np.float32(1 / len(side))
    right, up = side[None, None, :] - 0.17 * x, side[None, ::-1, None] - 0.17 * z
    radius, theta = np.hypot(right, up), np.arctan2(up, right)

    def soft(v: Any) -> Any:
        return 0.5 + 0.5 * np.tanh(v / (2 * w))

    body = soft(s * (0.8 + 0.2 * np.cos(lobes[:, None, None].astype(np.float32) * theta)) - radius)
    light = 0.65 + 0.35 * np.tanh(6 * (right * np.cos(alpha) + up * np.sin(alpha)) / s)
    dot = soft(0.15 * s - np.hypot(right - 0.45 * s * np.cos(beta), up - 0.45 * s * np.sin(beta)))
    away = np.abs((theta - spot + np.pi) % (2 * np.pi) - np.pi)
    arc = soft(0.12 * s - np.abs(radius - s)) * soft(s * (0.6 - away))

    image = np.broadcast_to(0.5 + 0.3 * _colour(hue_back), (*body.shape, 3))
    image = image + body[..., None] * (light[..., None] * (0.5 + 0.5 * _colour(hue_obj)) - image)
    image += dot[..., None] * (1 - image)
    image += arc[..., None] * (0.5 + 0.5 * _colour(hue_spot) - image)
    return np.clip(image, 0, 1)


def _colour(hue: Image) -> Image:
    return np.cos(hue[..., None] - np.arange(3, dtype=np.float32) * np.float32(2 * np.pi / 3))


def _checked(state: Any, shape: Any, n_pixels: int, box: bool) -> tuple[Image, NDArray[np.int64]]:
    """States in the units of the circular version, [n, 9], and codes of the shapes, [n]."""
    c = np.asarray(state)
    if c.ndim != 2 or c.shape[1] != 9 or c.dtype.kind not in "iuf" or not np.isfinite(c).all():
        raise DataError(f"state of shape {c.shape} and dtype {c.dtype} was given; give an array [n, 9] of finite numbers")
    if not isinstance(n_pixels, Integral) or isinstance(n_pixels, bool) or n_pixels < LEAST:
        raise DataError(f"n_pixels={n_pixels!r} was given; give a whole number of at least {LEAST}")
    c = c.astype(float) * np.repeat([2.0, np.pi / 2], [3, 6]) if box else c
    largest = np.abs(c[:, :3]).max(initial=0) / (2 if box else 1)
    if np.abs(c[:, :3]).max(initial=0) > 2 + 1e-6:
        raise DataError(f"a position of size {largest:.3g} was given; give positions of at most {1 if box else 2} in size")
    code = np.zeros(len(c), np.int64) if shape is None else np.asarray(shape)
    if code.shape != (len(c),) or code.dtype.kind not in "iu" or code.min(initial=0) < 0 or code.max(initial=0) >= len(LOBES):
        raise DataError(
            f"shape of shape {code.shape} and dtype {code.dtype} was given for {len(c)} states; give one code from 0 to 6 for each"
        )
    return np.concatenate([c[:, :3], c[:, 3:] % (2 * np.pi)], 1).astype(np.float32), code.astype(np.int64)
