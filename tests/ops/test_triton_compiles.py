"""The Triton kernels of operator_step_ through Triton's compiler for NVIDIA GPUs; that takes no GPU."""

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl
from op_inputs import INTERPRETED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "x_square_ptr": "*fp64",
    "previous_square_ptr": "*fp64",
    "out_square_ptr": "*fp64",
    "partial_ptr": "*fp64",
    "problems_ptr": "*i64",
    "tiles_ptr": "*i64",
    "bundles_ptr": "*i64",
    "entries_ptr": "*i32",
    "active_ptr": "*i1",
    "most_chains": "i32",
}


def ptx(kernel, capability: int, storage: str, constants: dict[str, object]) -> str:
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, f"*{storage}") for n in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize("capability", [80, 90])
def test_operator_step_compiles_and_multiplies_at_full_precision(capability):
    from fastlip.ops._triton import operator_step

    kernel = operator_step._operator_tile_kernel
    for storage, dtype, depth in (("fp32", tl.float32, 32), ("fp64", tl.float64, 16)):
        for gather in (False, True):
            text = ptx(kernel, capability, storage, {"GATHER": gather, "T": dtype, "DEPTH": depth})
            assert "tf32" not in text
            if storage == "fp32" and not gather:
                assert text.count("fma.rn.f32") >= 1024
    assert ".entry" in ptx(operator_step._operator_squares_kernel, capability, "fp32", {})
