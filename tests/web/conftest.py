"""The page's server, with a small random network that runs in the process of the tests."""

import contextlib

import pytest
import torch

pytest.importorskip("starlette", reason="the page's packages: pip install 'tarvis[web]'")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from tarvis.model import build_model
from tarvis.model.weights import save_weights
from tarvis.web.app import Server, look
from tarvis.web.jobs import network, reader
from tarvis.web.processes import Process
from tarvis.web.store import Limits, Store
from tests.tarvis.networks import SMALLEST

ORIGIN = {"Origin": "http://testserver", "Host": "testserver"}


class Inline(Process):
    """A process whose work is done in the thread that asks."""

    def __init__(self, answers):
        super().__init__(lambda: answers)
        self.answers = answers
        self.seen = []

    def ask(self, job):
        self.seen.append(job)
        yield from self.answers(job)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, build_model(SMALLEST).state_dict(), SMALLEST)
    return path


@pytest.fixture(scope="session")
def answers(weights):
    """What the network answers."""
    return network(str(weights), None, "cpu", False)


@pytest.fixture
def serve(tmp_path, answers):
    """Starts a server; gives a client that calls as the page does, and the server."""
    with contextlib.ExitStack() as stack:

        def start(network=None, limits=None, **options):
            limits = limits or Limits()
            reads = Inline(reader(limits.pixels))
            store = Store(tmp_path / "data", limits, lambda video: look(reads, video))
            network = network or Inline(answers)
            options = {"hosts": ("testserver",)} | options
            server = Server(store, network, reads, Inline(reader(limits.pixels)), **options)
            return stack.enter_context(TestClient(server.app(), headers=ORIGIN)), server

        yield start
