"""The Triton kernels through Triton's compiler for NVIDIA GPUs; that takes no GPU."""

import re

import pytest
import torch
from op_inputs import DTYPES, INTERPRETED, NORMS

pytest.importorskip("triton")
from test_triton_specialisations import CONV, MOST, READ, SIZES
from triton.compiler import CompiledKernel
from triton_launches import compiled, launch_apgd, launch_judge, launch_operator, launch_pgd, launch_start

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")


def ptx(kernels: list[tuple[str, CompiledKernel]], name: str) -> list[str]:
    texts = [kernel.asm["ptx"] for found, kernel in kernels if found == name]
    assert texts, name
    return texts


def assert_full_precision(text: str) -> None:
    """Of sums of products; and no approximate quotient."""
    assert "tf32" not in text
    assert "div.full.f32" not in text


def test_float32_compiles():
    """What a user on CIFAR-10 compiles: losses, steps in every norm, APGD, random starts and norms of operators."""
    x = torch.zeros(2, 3, 32, 32)
    with compiled() as kernels:
        for norm in NORMS:
            launch_pgd(x, norm)
            launch_apgd(x, norm)
            launch_start(x, norm)
        launch_operator([CONV], torch.float32)
        launch_judge(torch.zeros(64, 10))
    assert {name for name, _ in kernels} == MOST.keys()
    assert len(kernels) == len(MOST) + 2  # the ball's has two norms; tiles are summed, or their parts
    for name, kernel in kernels:
        assert ".target sm_90a" in kernel.asm["ptx"], name
        assert kernel.asm["cubin"], name
        assert_full_precision(kernel.asm["ptx"])
    (step,) = ptx(kernels, "_pgd_step_linf_kernel")
    assert step.count("ld.global.v4.b32") >= 3 * 2  # x, x0 and the gradient, 16 bytes at a time
    assert step.count("st.global.v4.b32") == 2 * 2  # x and the best
    (best,) = ptx(kernels, "_linf_kernel")
    assert best.count("ld.global.v4.b32") >= 5 * 2
    assert max(text.count("fma.rn.f32") for text in ptx(kernels, "_operator_tile_kernel")) >= 1024


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_a_dtype_compiles(dtype):
    with compiled() as kernels:
        for shape in [shapes[0] for shapes in SIZES.values()]:
            x = torch.zeros(shape, dtype=dtype)
            for norm in NORMS:
                launch_pgd(x, norm)
                launch_apgd(x, norm)
            launch_start(x, "l2")
    others = ("_operator", "_judge")
    assert {name for name, _ in kernels} == {name for name in MOST if not name.startswith(others)}
    for _, kernel in kernels:
        assert_full_precision(kernel.asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("read", READ, ids=str)
def test_every_kernel_for_what_models_read_compiles(read):
    with compiled() as kernels:
        for shape in [shapes[0] for shapes in SIZES.values()]:
            for norm in NORMS:
                launch_pgd(torch.zeros(shape), norm, read=read)
                launch_apgd(torch.zeros(shape), norm, read=read)
    for name in ("_pgd_step_linf_kernel", "_pgd_step_ball_kernel", "_linf_kernel", "_start_kernel", "_finish_kernel"):
        assert any("div.rn.f32" in text for text in ptx(kernels, name)), name
    for _, kernel in kernels:
        assert_full_precision(kernel.asm["ptx"])


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=str)
def test_losses_compile_in_double(dtype, capability):
    """Whatever the logits' dtype, so that numbers are rounded once."""
    with compiled(capability) as kernels:
        launch_judge(torch.zeros(64, 10, dtype=dtype))
    (text,) = ptx(kernels, "_judge_kernel")
    assert_full_precision(text)
    assert "div.rn.f64" in text
    assert not re.search(r"(div|fma|mul|sub|ex2|lg2)\.[\w.]*f32", text)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_operators_compile_at_full_precision(capability, dtype):
    with compiled(capability) as kernels:
        launch_operator([CONV], dtype)
    assert len(ptx(kernels, "_operator_tile_kernel")) == 2
    for name, kernel in kernels:
        assert f".target sm_{capability}" in kernel.asm["ptx"], name
        assert_full_precision(kernel.asm["ptx"])
