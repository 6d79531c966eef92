"""Turn a checkpoint into a safe file that holds its configuration too.

    python -m tarvis.convert 090000.pth tarvis_swin_tiny.safetensors
    python -m tarvis.convert 090000.pth out.safetensors --config elsewhere/config.yaml
    python -m tarvis.convert runs/tiny/005000.pth tiny.safetensors --average --half

IN is a published TarViS checkpoint with its config.yaml beside it, or any file of weights of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tarvis import cli, places
from tarvis.model import build_model
from tarvis.model.weights import (
    WeightsError,
    load_into,
    load_weights,
    read_config,
    save_weights,
    to_published,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the input does not convert; the output is then not touched."""
    args = parser().parse_args(argv)
    return cli.run(lambda: convert(args))


def parser() -> argparse.ArgumentParser:
    p = cli.command("tarvis.convert", __doc__)
    p.add_argument("input", metavar="IN", type=places.weights, help="checkpoint: .pth, .pt or .safetensors")
    p.add_argument("output", metavar="OUT", type=Path, help="file to write: .safetensors")
    cli.add_reading(p)
    p.add_argument("--published-names", action="store_true", help="keep the names of the published models")
    p.add_argument("--average", action="store_true", help="take the moving average of a training run")
    p.add_argument("--half", action="store_true", help="store float16, half the size")
    return p


def convert(args: argparse.Namespace) -> dict[str, str | int]:
    """Read the input, check that it is complete, write the output; returns what was written.

    Raises:
        WeightsError: as `load_weights` and `save_weights`; also where the input does not fit its network.
    """
    if args.output.suffix != ".safetensors":
        raise WeightsError(f"{args.output}: expected a name that ends in .safetensors")
    if os.path.realpath(args.output) == os.path.realpath(args.input):
        raise WeightsError(f"{args.output}: is the input, which would be replaced; name another file")
    config = None if args.config is None else read_config(args.config)
    state, config = load_weights(args.input, config=config, trust=args.trust, average=args.average)
    with torch.device("meta"):
        model = build_model(config)
    try:
        load_into(model, state)
    except WeightsError as error:
        raise WeightsError(f"{args.input}: {error}") from None
    if args.half:
        state = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    save_weights(args.output, to_published(state, config) if args.published_names else state, config)
    parameters = sum(p.numel() for p in model.parameters())
    cli.say(f"{args.output}: {config.backbone}, {parameters:,} parameters")
    return {
        "path": str(args.output),
        "backbone": config.backbone,
        "tensors": len(state),
        "parameters": parameters,
    }


if __name__ == "__main__":
    sys.exit(main())
