"""Which backend and instruction set serve, that the environment's word is kept, and what build_info says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from op_inputs import INTERPRETED, NORMS, make

import fastlip
from fastlip import ops

FORCED = os.environ.get("FASTLIP_BACKEND")
ISA = os.environ.get("FASTLIP_CPU_ISA")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("FASTLIP_BACKEND", "FASTLIP_CPU_ISA", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_forced_backend_is_the_one_in_use():
    """Without this, a test run under a forced backend could silently test another."""
    if FORCED == "triton" and torch.cuda.is_available() and not INTERPRETED:
        assert ops.backends["cuda"].name == "triton"
        return
    assert ops.backends["cpu"].name == (FORCED or "native")
    if torch.cuda.is_available():
        assert ops.backends["cuda"].name == (FORCED or "native")
    if ISA and ops.backends["cpu"].name == "native":
        assert fastlip.build_info().cpu_isa == ISA


def test_build_info():
    info = fastlip.build_info()
    assert info.version == fastlip.__version__
    assert info.compiled["version"] == fastlip.__version__, "the compiled part is of another version: reinstall"
    assert info.cpu_isa in info.compiled["cpu_isas"]
    assert json.loads(json.dumps(info.to_dict()))["backends"]["cpu"]["name"] == ops.backends["cpu"].name
    assert info.backends["cpu"].reason in str(info)
    assert info.compiled["cuda_toolkit"] or "FASTLIP_CUDA=ON pip install . builds it" in str(info)
    printed = subprocess.run([sys.executable, "-m", "fastlip"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(info)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTLIP_BACKEND": "fortran"}, "FASTLIP_BACKEND=fortran is unknown; choose one of native, triton, reference"),
        ({"FASTLIP_BACKEND": "triton"}, "set TRITON_INTERPRET=1"),
        ({"FASTLIP_CPU_ISA": "mmx"}, "FASTLIP_CPU_ISA=mmx is unknown"),
    ],
)
def test_what_cannot_be_had_is_an_error(environment, message):
    run = python("import fastlip.ops", **environment)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastlip: ")
    assert message in last


def test_a_missing_library_is_an_error_when_forced():
    hide = "import pathlib; pathlib.Path.exists = lambda self: False; import fastlip.ops"
    run = python(hide, FASTLIP_BACKEND="native")
    assert "libfastlip_cpu.so was not built" in run.stderr.strip().splitlines()[-1]
    run = python(hide + "; print(fastlip.ops.backends['cpu'])")
    assert run.returncode == 0
    assert "reference" in run.stdout


def test_forced_isas_agree_bit_for_bit_in_linf():
    code = (
        "import torch, hashlib; from fastlip import ops; g = torch.Generator().manual_seed(0);"
        "x0 = torch.rand(3, 1003, generator=g); x = x0 + torch.randn(3, 1003, generator=g);"
        "grad = torch.randn(3, 1003, generator=g);"
        "y = ops.pgd_step(ops.random_start(x0, eps=.1, generator=g) + x - x0, grad, x0, step_size=.1, eps=.3);"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    digests = {}
    for isa in fastlip.build_info().compiled["cpu_isas"].split(", "):
        run = python(code, FASTLIP_CPU_ISA=isa)
        if run.returncode and "is not supported by this CPU" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        digests[isa] = run.stdout
    digests["reference"] = python(code, FASTLIP_BACKEND="reference").stdout
    assert len(digests) >= 2
    assert len(set(digests.values())) == 1, digests


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3 * 9 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def test_one_linf_step_is_torchattacks_step_bit_for_bit():
    torchattacks = pytest.importorskip("torchattacks")
    model = _Linear().eval()
    _, _, images = make((16, 3, 9, 9), torch.float32, "cpu")
    labels = torch.arange(16) % 5
    for eps, step in ((8 / 255, 2 / 255), (0.1, 0.25), (1.0, 1 / 3)):
        attack = torchattacks.PGD(model, eps=eps, alpha=step, steps=1, random_start=False)
        want = attack(images, labels)
        x = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), labels), x)
        assert torch.equal(ops.pgd_step(images, grad, images, step_size=step, eps=eps), want)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_do_not_change_the_result(norm):
    x, grad, x0 = make((64, 3, 32, 32) if ops.backends["cpu"].name == "native" else (4, 50), torch.float32, "cpu")
    one = ops.pgd_step(x, grad, x0, step_size=0.1, eps=0.3, norm=norm)
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.pgd_step(x, grad, x0, step_size=0.1, eps=0.3, norm=norm), one)
    finally:
        torch.set_num_threads(1)
