"""How engines run on streams, contexts and CUDA graphs, over a fake TensorRT and a fake device."""

import contextlib
import ctypes
import warnings
from types import SimpleNamespace

import pytest
import torch

from export.runtimes.tensorrt import MOST_RECORDED, TensorRTGraph, require_within
from tarvis.structures import InputError

CPU = torch.device("cpu")


class Context:
    """Doubles the floats of x into y."""

    def __init__(self, engine):
        self.engine, self.addresses, self.shape, self.memory = engine, {}, None, None
        if engine.capturable is not None:
            self.is_stream_capturable = lambda _: engine.capturable

    def set_device_memory(self, address, size):
        self.memory = address, size

    def set_input_shape(self, _, shape):
        self.shape = shape
        return True

    def get_tensor_shape(self, _):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def infer_shapes(self):
        return []

    def execute_async_v3(self, _):
        n = self.shape[0]
        x, y = ((ctypes.c_float * n).from_address(self.addresses[name]) for name in "xy")
        y[:] = [2 * value for value in x]
        self.engine.ran.append(self)
        return True


class Engine:
    device_memory_size_v2, num_io_tensors = 1000, 2

    def __init__(self, shape=(-1,), capturable=None, memory=True):
        self.shape, self.capturable, self.memory = shape, capturable, memory
        self.contexts, self.ran, self.settings = [], [], None

    def create_execution_context(self, settings):
        self.settings = settings
        if not self.memory:
            return None
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def create_runtime_config(self):
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: self.ran.append(strategy),
            create_runtime_cache=lambda: "cache",
            set_runtime_cache=lambda _: True,
        )

    def get_tensor_name(self, i):
        return "xy"[i]

    def get_tensor_dtype(self, _):
        return "float32"

    def get_tensor_mode(self, name):
        return {"x": "in", "y": "out"}[name]

    def get_tensor_shape(self, _):
        return self.shape

    def get_tensor_profile_shape(self, *_):
        assert -1 in self.shape, "a static engine has no profile"
        return [(1,), (4,), (99,)]


def library(**more):
    kinds = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="11.0",
        TensorIOMode=SimpleNamespace(INPUT="in"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
        **{kind: kind for kind in kinds},
        **more,
    )


class Stream:
    cuda_stream = 7

    def wait_stream(self, _):
        pass


class CUDAGraph:
    """Runs again what ran last while it was recorded."""

    recorded = None

    def replay(self):
        self.recorded.execute_async_v3(0)


@pytest.fixture
def open_graph(tmp_path, monkeypatch):
    """Opens an engine; `capture` is called in a capture, with the number of those before."""
    (tmp_path / "decoder.engine").touch()

    def opened(engine, capture=lambda _: None, trt=None):
        captures = []

        @contextlib.contextmanager
        def record(graph, **_):
            capture(len(captures))
            captures.append(graph)
            yield
            graph.recorded = engine.ran[-1]

        fakes = {
            "get_device_name": lambda _: "a toaster",
            "mem_get_info": lambda _: (2**30, 2**34),
            "Stream": lambda _: Stream(),
            "current_stream": lambda _: Stream(),
            "device": contextlib.nullcontext,
            "stream": contextlib.nullcontext,
            "CUDAGraph": CUDAGraph,
            "graph": record,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: engine)
        return TensorRTGraph(trt or library(), runtime, tmp_path / "decoder.engine", CPU)

    return opened


def check(graph, n, value=3.0):
    x = torch.full((n,), value)
    torch.testing.assert_close(graph({"x": x})["y"], 2 * x)


def test_every_recording_has_a_context_of_its_own_over_the_same_memory(open_graph):
    engine = Engine()
    graph = open_graph(engine)
    for n in (4, 5, 4, 5, 4, 5, 6):
        check(graph, n, value=float(len(engine.ran)))
    first, *others = engine.contexts
    assert len(others) == 2
    assert {context.memory for context in engine.contexts} == {(graph.scratch.data_ptr(), 1000)}
    # as it is, as it is, recorded (run, captured, replayed) twice, replayed twice, as it is
    assert engine.ran == [first, first, *3 * others[:1], *3 * others[1:], *others, first]


def failing(_):
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize(
    ("capturable", "capture", "said"),
    [(None, failing, r"\(operation not permitted\)"), (False, lambda _: None, "does not allow")],
)
def test_what_cannot_be_recorded_is_said_once_and_runs_unrecorded(open_graph, capturable, capture, said):
    graph = open_graph(Engine(capturable=capturable), capture)
    check(graph, 4)
    with pytest.warns(UserWarning, match=rf"decoder: x \[4\] cannot be recorded .*{said}.* slower"):
        check(graph, 4, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(graph, 4, 2.0)


def test_a_capture_that_fails_for_one_shape_is_no_obstacle_to_others(open_graph):
    engine = Engine(capturable=True)
    failures = [failing]
    graph = open_graph(engine, lambda number: failures.pop()(number) if failures else None)
    check(graph, 4)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        check(graph, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            check(graph, 5)
    assert [recording is None for recording in graph.recordings.values()] == [True, False]


def test_so_many_shapes_are_recorded(open_graph):
    engine = Engine()
    graph = open_graph(engine)
    for n in range(1, MOST_RECORDED + 1):
        for _ in range(2):
            check(graph, n)
    check(graph, 90)
    with pytest.warns(UserWarning, match="more than 8 sets of shapes"):
        check(graph, 90)
    assert len(engine.contexts) == 1 + MOST_RECORDED


def test_tensorrt_rtx_compiles_for_the_shape_before_it_is_recorded(open_graph):
    strategies = SimpleNamespace(LAZY="lazy", EAGER="eager")
    engine = Engine()
    open_graph(engine, trt=library(DynamicShapesKernelSpecializationStrategy=strategies))
    assert engine.settings.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert engine.ran == ["ours"]


def test_an_engine_for_one_shape_takes_no_other(open_graph):
    graph = open_graph(Engine(shape=(4,)))
    check(graph, 4)
    with pytest.raises(InputError, match=r"takes x of \[4\], not \[3\]: build it for that shape$"):
        check(graph, 3)


def test_an_engine_that_is_there_but_has_no_room_is_not_to_be_built_again(open_graph):
    with pytest.raises(InputError, match=r"decoder.engine: too little memory on a toaster, 1.0 GiB are free"):
        open_graph(Engine(memory=False))


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((1, 145, 128), "with greater --max-objects, --max-frames or --max-size"),
        ((1, 16, 128), "for that shape"),
        ((1, 145, 256), "for that shape"),
        ((145, 128), "for that shape"),
    ],
)
def test_a_shape_that_the_profile_does_not_hold_is_refused(shape, advice):
    least, most = (1, 17, 128), (1, 144, 128)
    require_within("decoder", "content", (1, 48, 128), least, most)
    with pytest.raises(InputError, match=rf"\[1, 17, 128\] to \[1, 144, 128\], not .*: build it {advice}$"):
        require_within("decoder", "content", shape, least, most)
