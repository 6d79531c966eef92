"""Official downloads into the files that training reads.

    python -m tarvis.datasets.convert davis --download DAVIS --workspace "$TARVIS_WORKSPACE_DIR"

Evaluation reads the official downloads as they are. Training wants some benchmarks in files that were only
offered ready-made; this makes them, below WORKSPACE/dataset_annotations. Frames are neither moved nor copied:
link them to where tarvis/datasets/README.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tarvis.datasets.benchmark import WORKSPACE
from tarvis.datasets.benchmarks import CONVERTERS
from tarvis.structures import InputError


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        "python -m tarvis.datasets.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("benchmark", choices=CONVERTERS, metavar="BENCHMARK", help=", ".join(CONVERTERS))
    p.add_argument(
        "--download", type=Path, required=True, metavar="DIR", help="the unpacked official download"
    )
    p.add_argument(
        "--workspace",
        type=Path,
        default=os.environ.get(WORKSPACE),
        metavar="DIR",
        help=f"(default: ${WORKSPACE})",
    )
    args = p.parse_args(argv)
    if args.workspace is None:
        p.error(f"give --workspace DIR, or set {WORKSPACE}")
    try:
        made = CONVERTERS[args.benchmark].convert(args.download, args.workspace)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"benchmark": args.benchmark, "files": [str(path) for path in made]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
