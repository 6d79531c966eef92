"""What others compute, as the benchmark has it: equal to our reference, and the CUDA source to both."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import classic, timing
from bench.case import record_cases
from bench.cases import deformable
from bench.record import Recorder
from kernels import ms_deform_attn
from kernels.ms_deform_attn import cell_centres

SHAPES = ((1, 2), (3, 4), (6, 7))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATION = Path(__file__).parents[1] / "kernels" / "cuda_on_cpu"

WRAPPER = """
#include "cuda_runtime.h"
#define __forceinline__ inline
#include "classic_msda.cu"
template <typename... P, typename... A>
int launch(int blocks, int threads, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
extern "C" int forward(int blocks, int threads, const float* value, const long long* sizes,
    const long long* starts, const float* locations, const float* weights, float* out,
    int B, int S, int Q, int A, int D, int L, int P) {
  return launch(blocks, threads, classic_forward, value, sizes, starts, locations, weights, out,
    B, S, Q, A, D, L, P);
}
extern "C" int backward(int blocks, int threads, const float* grad, const float* value,
    const long long* sizes, const long long* starts, const float* locations, const float* weights,
    float* grad_value, float* grad_locations, float* grad_weights,
    int B, int S, int Q, int A, int D, int L, int P) {
  return launch(blocks, threads, classic_backward, grad, value, sizes, starts, locations, weights,
    grad_value, grad_locations, grad_weights, B, S, Q, A, D, L, P);
}
"""


def inputs(dtype=torch.float32, device="cpu", dim=32):
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in SHAPES)
    value = torch.randn(2, cells, 2, dim, generator=generator, dtype=dtype)
    offset = 2 * torch.randn(2, cells, 2, len(SHAPES), 3, 2, generator=generator, dtype=dtype)
    logit = torch.randn(2, cells, 2, len(SHAPES), 3, generator=generator, dtype=dtype)
    return tuple(x.to(device).requires_grad_() for x in (value, offset, logit))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The kernels on the CPU, thread by thread, in the place of those that nvcc compiles."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    folder = tmp_path_factory.mktemp("classic")
    (folder / "wrapper.cpp").write_text(WRAPPER)
    include = [f"-I{EMULATION}", f"-I{classic.SOURCE.parent}"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *include, "-Wno-unknown-pragmas"]
    subprocess.run([*command, folder / "wrapper.cpp", "-o", folder / "classic.so"], check=True)
    library = ctypes.CDLL(str(folder / "classic.so"))

    def kernel(name):
        function = getattr(library, name.removeprefix("classic_"))

        def launch(grid, block, arguments):
            plain = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else x for x in arguments]
            assert function(grid[0], block[0], *plain) == 0

        return launch

    return kernel


def test_the_grid_sample_form_is_our_reference():
    given = inputs(torch.float64)
    expected = ms_deform_attn(*given, SHAPES, impl="reference")
    got = classic.by_grid_sample(*given, SHAPES, cell_centres(SHAPES, given[0].device))
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)  # centres are float32


def check_classic(device):
    given = inputs(device=device)
    ref = cell_centres(SHAPES, given[0].device)
    expected = classic.by_grid_sample(*given, SHAPES, ref)
    got = classic.by_classic_kernel(*given, SHAPES, ref)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(device)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got, given, grad), torch.autograd.grad(expected, given, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_classic_kernel_emulated_equals_grid_sample(emulated, monkeypatch):
    monkeypatch.setattr(classic, "kernel", emulated)
    check_classic("cpu")


@pytest.mark.parametrize("section", [deformable.forward, deformable.backward])
def test_the_benchmark_times_the_classic_kernel(emulated, monkeypatch, section):
    monkeypatch.setattr(classic, "kernel", emulated)
    monkeypatch.setattr(classic, "missing", lambda _: "")
    monkeypatch.setattr(Recorder, "can_gate", lambda *_: False)  # another test has the gates
    monkeypatch.setattr(timing, "EAGER_SECONDS", 0.001)
    rows = []
    record_cases(Recorder("cpu", True, lambda: False, rows.append), section("cpu", "tiny"))
    found = [row for row in rows if row["impl"].startswith("classic")]
    assert found
    for row in found:
        assert row.get("eager_us") or row.get("bytes"), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_the_classic_kernel_on_a_gpu_equals_grid_sample():
    check_classic("cuda")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_the_source_compiles_without_spills(tmp_path):
    command = ["nvcc", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out.cubin"]
    done = subprocess.run([*command, classic.SOURCE], capture_output=True, text=True, check=True)
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2
