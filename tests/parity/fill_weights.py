"""Deterministic weights for the TarViS reference tests.

``fill(name, shape, dtype, seed)`` returns the same tensor on every machine and every NumPy version:
it only uses the raw 64-bit output of the Philox-4x64-10 counter generator (an algorithm, not a NumPy
"distribution"), keyed by SHA-256 of ``"<seed>|<name>"``, followed by exact integer arithmetic.

``fill_like(mapping, seed)`` takes any mapping  ORIGINAL parameter name -> tensor (or anything with
``.shape`` and ``.dtype``) and returns a dict of torch tensors that can be passed to
``load_state_dict(..., strict=True)``.  Geometry buffers that must not be random
(``relative_position_index``, ``bg_grid_size``, ``pixel_mean``, ``pixel_std``) are rebuilt from their
definition.

The manifests in ``state_dict/*.json`` list names, shapes and dtypes, so a full set of weights can be made
without the original code:   python fill_weights.py state_dict/resnet50.json --seed 0 --out r50.pth
(the file has the layout of an official checkpoint: ``{"model": {...}}``).
"""

import argparse
import hashlib
import json
import math

import numpy as np
import torch


# ------------------------------------------------------------------------------------ raw numbers
def _raw(key_text, n):
    key = int.from_bytes(hashlib.sha256(key_text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(int(n))  # uint64, fixed by the algorithm


def unit_noise(key_text, shape, centre_rows=False):
    """Zero-mean, unit-variance, bounded by 2*sqrt(3); near-normal (sum of four uniform 16-bit numbers).

    centre_rows: make each row (first index) sum to about zero, in exact integer arithmetic.  Used for layers
    that follow a ReLU: their positive mean input would otherwise make all outputs alike.
    """
    n = int(np.prod(shape)) if len(shape) else 1
    r = _raw(key_text, n)
    s = ((r & 0xFFFF) + ((r >> 16) & 0xFFFF) + ((r >> 32) & 0xFFFF) + (r >> 48)).astype(np.int64) - 131070
    if centre_rows:
        s = s.reshape(shape[0], -1)
        s = s - s.sum(1, keepdims=True) // s.shape[1]
    x = s.astype(np.float64) * (math.sqrt(3.0) / 65536.0)
    return x.astype(np.float32).reshape(shape)


_AFTER_RELU = (
    ".linear2.weight",
    ".mlp.2.weight",
    "layers.1.weight",
    "layers.2.weight",
    "extractor.layers.4.weight",
)


def _after_relu(name, shape):
    if len(shape) == 4:  # ResNet convolutions other than the stem
        return "backbone.backbone" in name and not name.endswith(("stem.conv1.weight", "proj.weight"))
    return len(shape) == 2 and name.endswith(_AFTER_RELU) and "input_proj" not in name


def uniform01(key_text, shape):
    n = int(np.prod(shape)) if len(shape) else 1
    return ((_raw(key_text, n) >> 40).astype(np.float64) / 2.0**24).reshape(shape)  # exact in float32 too


# ------------------------------------------------------------------------------------ rules by name
def _rel_pos_index(window):
    c = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    d = c[:, :, None] - c[:, None, :] + (window - 1)
    return d[0] * (2 * window - 1) + d[1]


def fill(name, shape, dtype="float32", seed=0):
    shape = tuple(int(s) for s in shape)
    leaf = name.rsplit(".", 1)[-1]

    if leaf == "pixel_mean":
        return torch.tensor([123.675, 116.28, 103.53])
    if leaf == "pixel_std":
        return torch.tensor([58.395, 57.12, 57.375])
    if leaf == "bg_grid_size":
        return torch.tensor([4, 4], dtype=torch.int64)
    if leaf == "relative_position_index":
        w = round(math.sqrt(shape[0]))
        return torch.from_numpy(_rel_pos_index(w).astype(np.int64))
    if leaf == "scaling_factors":
        return torch.tensor([32.0, 32.0, 16.0, 16.0, 8.0, 8.0, 4.0, 4.0])
    if not dtype.startswith("float"):
        raise ValueError(f"no rule for {name} ({dtype})")

    n = unit_noise(f"{seed}|{name}", shape, centre_rows=_after_relu(name, shape))

    if leaf == "running_var":
        x = 1.0 + 0.25 * n  # within [0.13, 1.87]
    elif leaf == "running_mean":
        x = 0.1 * n
    elif "sampling_offsets" in name:
        # offsets are in pixels of each level: a spread of a few pixels, so that many points fall outside
        x = 2.0 * n if leaf == "bias" else n * (0.75 / math.sqrt(shape[1]))
    elif "attention_weights" in name and leaf == "weight":
        x = n / math.sqrt(shape[1])
    elif leaf in ("bias", "in_proj_bias"):
        x = 0.05 * n
    elif leaf == "relative_position_bias_table":
        x = 0.5 * n
    elif (
        leaf.endswith("_embed")
        or leaf in ("level_embed_3d",)
        or "scale_embed" in name
        or "embedding_container" in name
    ):
        x = n  # query / level / scale embeddings: unit normal
        if "level_embed" in leaf or "scale_embed" in name:
            x = 0.25 * n
    elif len(shape) == 1 and leaf == "weight":  # every norm layer
        x = 1.0 + 0.1 * n
        if name.endswith("conv3.norm.weight"):  # last norm of a residual branch: keep sums small
            x = 0.3 * x
    elif len(shape) == 4:  # convolutions (He gain only where a ReLU follows)
        fan_in = shape[1] * shape[2] * shape[3]
        gain = math.sqrt(2.0) if "backbone.backbone" in name and ".conv" in name else 1.0
        x = n * (gain / math.sqrt(fan_in))
    elif len(shape) == 2:
        gain = 1.0
        if "mask_embeds" in name:
            gain = 0.5 if name.endswith("layers.2.weight") else math.sqrt(2.0)
        elif "proj_layers" in name:
            gain = 0.5
        elif leaf == "in_proj_weight":  # rows: query, key, value
            rows = np.full((shape[0], 1), 1.0, np.float32)
            rows[: 2 * shape[0] // 3] = 2.0  # peaked attention, so that queries stay different
            n = n * rows
        elif "out_proj" in name or ".linear2" in name or ".mlp.2" in name:
            gain = 0.4  # post-norm branches small next to the residual
            if name.startswith("decoder."):
                gain = 0.3
        x = n * (gain / math.sqrt(shape[1]))
    else:
        raise ValueError(f"no rule for {name} {shape}")
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.float32)))


def fill_like(mapping, seed=0):
    out = {}
    for name, t in mapping.items():
        v = fill(name, tuple(t.shape), str(t.dtype).replace("torch.", ""), seed)
        assert tuple(v.shape) == tuple(t.shape), (name, v.shape, t.shape)
        out[name] = v
    return out


def fill_manifest(path, seed=0):
    with open(path) as f:
        return {n: fill(n, s, d, seed) for n, s, d in json.load(f)}


def digest(sd):
    h = hashlib.sha256()
    for k in sorted(sd):
        h.update(k.encode())
        h.update(np.ascontiguousarray(sd[k].numpy()).tobytes())
    return h.hexdigest()


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("manifest")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--out")
    a = ap.parse_args()
    sd = fill_manifest(a.manifest, a.seed)
    print(len(sd), "tensors, sha256", digest(sd))
    if a.out:
        torch.save({"model": sd}, a.out)
