"""Deterministic inputs for the TarViS reference tests (NumPy only, exact integer arithmetic).

Everything is a pure function of its arguments; nothing here uses a NumPy "distribution", so the values are
the same for every NumPy version.
"""

import math

import numpy as np
from fill_weights import _raw, uniform01, unit_noise


def clip_images(num_frames, height, width, seed):
    """RGB clip, float32 array [T, 3, H, W] holding integers 0..255.

    A multi-scale blocky texture (cell sizes 48, 16, 5 and 1 pixels), moved 3 pixels right and 2 pixels down
    per frame, plus a little per-frame noise.
    """
    big_h, big_w = height + 2 * num_frames, width + 3 * num_frames
    acc = np.zeros((3, big_h, big_w), dtype=np.int64)
    for cell, weight in ((48, 5), (16, 4), (5, 3), (1, 2)):
        ch, cw = -(-big_h // cell), -(-big_w // cell)
        v = (_raw(f"{seed}|image|{cell}", 3 * ch * cw) >> 56).astype(np.int64).reshape(3, ch, cw)
        v = np.repeat(np.repeat(v, cell, 1), cell, 2)[:, :big_h, :big_w]
        acc += weight * v
    frames = []
    for t in range(num_frames):
        y0, x0 = 2 * (num_frames - 1 - t), 3 * (num_frames - 1 - t)
        f = acc[:, y0 : y0 + height, x0 : x0 + width]
        noise = (
            (_raw(f"{seed}|noise|{t}", 3 * height * width) >> 56).astype(np.int64).reshape(3, height, width)
        )
        f = (f * 15 + noise * 14) // (14 * 16)  # 0..255
        frames.append(np.clip(f, 0, 255))
    return np.stack(frames).astype(np.float32)


def ellipse_mask(height, width, cy, cx, ry, rx):
    """uint8 mask of an axis-aligned ellipse, integer test only."""
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    return ((y - cy) ** 2 * rx**2 + (x - cx) ** 2 * ry**2 <= (rx * ry) ** 2).astype(np.uint8)


def object_masks(height, width, num_objects, seed):
    """uint8 [N, H, W]; ellipses of different size, spread along the diagonal; object n has its own shape."""
    out = []
    for n in range(num_objects):
        r = (_raw(f"{seed}|mask|{n}", 4) >> 32).astype(np.int64)
        cy = int((2 * n + 1) * height // (2 * num_objects) + r[0] % 5 - 2)
        cx = int((2 * n + 1) * width // (2 * num_objects) + r[1] % 7 - 3)
        ry = int(height // 8 + r[2] % max(1, height // 10))
        rx = int(width // 9 + r[3] % max(1, width // 12))
        out.append(ellipse_mask(height, width, cy, cx, ry, rx))
    return np.stack(out)


def points(num_objects, seed):
    """float32 [N, 2], (y, x) normalised to the un-padded image, well inside [0, 1]."""
    u = uniform01(f"{seed}|points", (num_objects, 2))
    return (0.08 + 0.84 * u).astype(np.float32)


def feature(name, shape, seed, scale=1.0):
    """float32 feature tensor: zero mean, unit variance, mildly smooth along the last two axes."""
    a = unit_noise(f"{seed}|{name}|a", shape).astype(np.float64)
    if len(shape) >= 2 and min(shape[-2:]) >= 2:
        ch, cw = -(-shape[-2] // 2), -(-shape[-1] // 2)
        b = unit_noise(f"{seed}|{name}|b", (*shape[:-2], ch, cw)).astype(np.float64)
        b = np.repeat(np.repeat(b, 2, -2), 2, -1)[..., : shape[-2], : shape[-1]]
        a = (a + b) * math.sqrt(0.5)
    return (scale * a).astype(np.float32)


def deform_attn_inputs(shapes, batch, queries, heads, head_dim, n_points, seed, spread=0.25):
    """float64 inputs of the deformable-attention sampling operation.

    value     [N, S, M, D]          unit noise (S = sum of H_l * W_l)
    locations [N, Lq, M, L, P, 2]   (x, y), uniform in [-spread, 1 + spread] : part of them outside the image
    weights   [N, Lq, M, L, P]      positive, summing to one over (L, P)
    grad_out  [N, Lq, M * D]        unit noise, the gradient fed to the output
    """
    s = sum(h * w for h, w in shapes)
    n_lvl = len(shapes)
    value = unit_noise(f"{seed}|value", (batch, s, heads, head_dim)).astype(np.float64)
    loc = uniform01(f"{seed}|loc", (batch, queries, heads, n_lvl, n_points, 2)) * (1 + 2 * spread) - spread
    w = uniform01(f"{seed}|weights", (batch, queries, heads, n_lvl, n_points)) + 0.05
    w = w / w.sum((-1, -2), keepdims=True)
    grad = unit_noise(f"{seed}|grad", (batch, queries, heads * head_dim)).astype(np.float64)
    return value, loc, w, grad
