# ruff: noqa: E501, B007
"""Inputs of the stitching cases: clip predictions rebuilt from a description, in exact integer arithmetic.

``clip_inputs(inputs)`` takes the ``inputs`` object of a case file and returns one dict per clip (``None`` for a VOS clip
that was skipped because no object was left):

    frames          list of frame indices
    mask_logits     float32 [Q or N, T, h4, w4]   instance or object mask logits
    class_logits    float32 [Q, 1 + K]            instance and panoptic cases; background first
    semantic_logits float32 [C, T, h4, w4]        panoptic cases
    ids, lost       lists                          VOS cases

All values are integers divided by 4096, so float32 holds them exactly. The random numbers are raw Philox-4x64-10 words
keyed by a SHA-256, not a NumPy distribution, so every NumPy version gives the same. ``sha256(clips)`` is stored in each
case file: compare it once before testing anything else.

How a blob is drawn. Positions and sizes are in 1/8 of a logit pixel. At frame t the centre is
(cy + vy*t, cx + vx*t) plus a shift drawn per (clip, blob), at most ``jitter`` in each axis: two clips never agree exactly
on the frames they share. With q = dy^2/ry^2 + dx^2/rx^2 the value is clamp(gain * (1 - q), -low, high) + noise.
Outside the blob's life (frame < first or > last) the value is -low + noise: an empty mask.
"""

import hashlib

import numpy as np

UNIT = 4096


def _raw(text, n):
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(int(n))  # uint64


def _noise(text, shape, amplitude):
    """int64, uniform in [-amplitude, amplitude]."""
    r = (_raw(text, int(np.prod(shape))) >> 33).astype(np.int64)
    return (r % (2 * amplitude + 1) - amplitude).reshape(shape)


def _small(text, n, amplitude):
    return [int(v) for v in _noise(text, (n,), amplitude)] if amplitude else [0] * n


def _blob(frames, h4, w4, blob, shift, low, high, gain):
    """int64 [T, h4, w4] without noise."""
    y = np.arange(h4, dtype=np.int64)[:, None] * 8
    x = np.arange(w4, dtype=np.int64)[None, :] * 8
    out = np.full((len(frames), h4, w4), -low, np.int64)
    for i, t in enumerate(frames):
        if not blob["first"] <= t <= blob["last"]:
            continue
        dy = y - (blob["cy"] + blob["vy"] * t + shift[0])
        dx = x - (blob["cx"] + blob["vx"] * t + shift[1])
        q = dy * dy * UNIT // (blob["ry"] ** 2) + dx * dx * UNIT // (blob["rx"] ** 2)
        out[i] = np.clip(gain * (UNIT - q) // UNIT, -low, high)
    return out


def _masks(inputs, clip_no, frames, slots):
    seed, h4, w4 = inputs["seed"], inputs["h4"], inputs["w4"]
    low, high, gain = inputs["low"], inputs["high"], inputs["gain"]
    out = np.empty((len(slots), len(frames), h4, w4), np.int64)
    for n, name in enumerate(slots):
        if name is None:
            out[n] = -low
        else:
            shift = _small(f"{seed}|shift|{clip_no}|{name}", 2, inputs["jitter"])
            out[n] = _blob(frames, h4, w4, inputs["blobs"][name], shift, low, high, gain)
        out[n] += _noise(f"{seed}|noise|{clip_no}|{n}", out[n].shape, inputs["noise"])
    return out


def _classes(inputs, clip_no, scores):
    """scores: per query [class (0-based, or -1 for background), lead] or [class, lead, lead of the background]; added to the logits."""
    k = inputs["num_classes"]
    out = _noise(f"{inputs['seed']}|class|{clip_no}", (len(scores), 1 + k), inputs["class_noise"])
    for n, (c, lead, *background) in enumerate(scores):
        out[n, 1 + c] += lead
        out[n, 0] += sum(background)
    return out


def _semantic(inputs, clip_no, frames):
    """Every class is a wavy horizontal or vertical band, or the union of some blobs, or nowhere."""
    seed, h4, w4, c = inputs["seed"], inputs["h4"], inputs["w4"], inputs["num_classes"]
    low = inputs["low"]
    out = np.full((c, len(frames), h4, w4), -low, np.int64)
    y = np.arange(h4, dtype=np.int64)[:, None] * 8
    x = np.arange(w4, dtype=np.int64)[None, :] * 8
    for band in inputs["bands"]:
        s = _small(f"{seed}|band|{clip_no}|{band['class']}", 1, inputs["band_jitter"])[0]
        for i, t in enumerate(frames):
            along, across = (x, y) if band["axis"] == "y" else (y, x)
            wave = np.abs((along + 8 * t) % 128 - 64) // 4
            d = np.abs(across + wave - (band["centre"] + band["speed"] * t + s))
            v = band["gain"] * (band["half"] - d) // band["half"]
            v = np.broadcast_to(np.clip(v, -low, inputs["high"]), (h4, w4))
            out[band["class"], i] = np.maximum(out[band["class"], i], v)
    for cls, names in inputs["semantic_blobs"].items():
        for name in names:
            shift = _small(f"{seed}|semshift|{clip_no}|{name}", 2, inputs["jitter"])
            v = _blob(frames, h4, w4, inputs["blobs"][name], shift, low, inputs["high"], inputs["gain"])
            out[int(cls)] = np.maximum(out[int(cls)], v)
    for k in range(c):
        out[k] += _noise(f"{seed}|sem|{clip_no}|{k}", out[k].shape, inputs["semantic_noise"])
    return out


def _float(a):
    return (a.astype(np.float64) / UNIT).astype(np.float32)


def clip_inputs(inputs):
    clips = []
    for no, clip in enumerate(inputs["clips"]):
        frames = clip["frames"]
        if clip.get("skipped"):
            clips.append(None)
            continue
        m = _masks(inputs, no, frames, clip["slots"])
        out = {"frames": list(frames)}
        if inputs["task"] == "vos":
            out["ids"], out["lost"] = list(clip["ids"]), list(clip["lost"])
            for n, name in enumerate(clip["slots"]):  # frames before the object's reference
                zero = clip["zeroed"][n]
                if zero:
                    m[n, :zero] = -1000 * UNIT
        else:
            out["class_logits"] = _float(_classes(inputs, no, clip["scores"]))
        if inputs["task"] == "panoptic":
            out["semantic_logits"] = _float(_semantic(inputs, no, frames))
        out["mask_logits"] = _float(m)
        clips.append(out)
    return clips


def sha256(clips):
    h = hashlib.sha256()
    for c in clips:
        for key in ("mask_logits", "class_logits", "semantic_logits"):
            if c is not None and key in c:
                h.update(np.ascontiguousarray(c[key], "<f4").tobytes())
    return h.hexdigest()


def resize_logits(seed, n, t, h4, w4):
    """float32 [N, T, h4, w4] of the resize cases: two blobs' worth of smooth ups and downs plus noise."""
    y = np.arange(h4, dtype=np.int64)[:, None]
    x = np.arange(w4, dtype=np.int64)[None, :]
    out = np.empty((n, t, h4, w4), np.int64)
    for a in range(n):
        for b in range(t):
            p = _small(f"{seed}|resize|{a}|{b}", 3, 40)
            wave = (
                np.abs((x * 5 + y * 3 + p[0]) % 64 - 32)
                + np.abs((x * 2 - y * 7 + p[1]) % 96 - 48)
                - 40
                + p[2] // 8
            )
            out[a, b] = wave * (UNIT // 8)
    return _float(out + _noise(f"{seed}|resizenoise", out.shape, UNIT))


def texture(seed, h, w, cell=7):
    """uint8 [h, w, 3]: blocks of random colour plus pixel noise."""
    ch, cw = -(-h // cell), -(-w // cell)
    v = (_raw(f"{seed}|tex|{h}x{w}", 3 * ch * cw) >> 56).astype(np.int64).reshape(ch, cw, 3)
    v = np.repeat(np.repeat(v, cell, 0), cell, 1)[:h, :w]
    return np.clip(
        (v * 3 + (_raw(f"{seed}|texnoise|{h}x{w}", 3 * h * w) >> 56).astype(np.int64).reshape(h, w, 3)) // 4,
        0,
        255,
    ).astype(np.uint8)


def ellipse(h, w, cy, cx, ry, rx):
    y, x = np.arange(h)[:, None], np.arange(w)[None, :]
    return ((y - cy) ** 2 * rx**2 + (x - cx) ** 2 * ry**2 <= (rx * ry) ** 2).astype(np.uint8)
