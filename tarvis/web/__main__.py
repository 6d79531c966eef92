"""Point at anything in a video, watch it followed, correct it, take it away: a page in the browser.

    python -m tarvis.web
    python -m tarvis.web --weights weights.pth --port 8080
    python -m tarvis.web --host 0.0.0.0      # for others, who need the token that is printed

Nothing leaves this machine. Videos and masks are kept in --data until they are deleted, or for two weeks.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tarvis import cli
from tarvis.structures import InputError
from tarvis.web.jobs import network, reader
from tarvis.web.processes import Process
from tarvis.web.store import Limits, Store


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: serve(args))


def parser() -> argparse.ArgumentParser:
    p = cli.command("tarvis.web", __doc__)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--weights", metavar="FILE", help=cli.WEIGHTS)
    which.add_argument("--engine", metavar="DIR", help="a folder that export.to_onnx, aoti or trt has made")
    p.add_argument("--trust", action="store_true", help="allow pickled objects, or machine code of others")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the network on a CPU")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=7860, help="0 for a free one (7860)")
    p.add_argument("--data", type=Path, default=Path("runs/web"), help="folder of the sessions (runs/web)")
    p.add_argument("--max-upload", type=int, default=2048, metavar="MB", help="bytes of an upload (2048)")
    return p


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Serve until it is stopped."""
    try:
        import uvicorn

        from tarvis.web.app import LOOPBACK, Server, look
    except ImportError as error:
        raise InputError(f"the page needs two more packages: pip install 'tarvis[web]' ({error})") from None
    limits = Limits(upload=args.max_upload * 2**20)
    follows = Process(partial(network, args.weights, args.engine, args.device, args.trust), args.threads)
    reads, writes = (Process(partial(reader, limits.pixels)) for _ in range(2))
    follows.start()
    store = Store(args.data.absolute(), limits, partial(look, reads))
    is_private = args.host in (*LOOPBACK, "::1")
    token = None if is_private else secrets.token_urlsafe(16)
    server = Server(store, follows, reads, writes, hosts=LOOPBACK if is_private else None, token=token)
    config = uvicorn.Config(
        server.app(),
        host=args.host,
        port=args.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    sockets = [config.bind_socket()]
    sockets[0].listen(config.backlog)  # who comes now waits, and is not turned away
    port = sockets[0].getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"open http://{host}:{port}/" + (f"?token={token}" if token else ""), file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=sockets)
    return {}


if __name__ == "__main__":
    sys.exit(main())
