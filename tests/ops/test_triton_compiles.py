"""The Triton kernels through Triton's compiler for NVIDIA GPUs; that takes no GPU."""

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
#: Of the PGD family: numbers of a sample lie in the arithmetic's dtype.
NUMBERS = ("step_size", "eps", "lo", "hi", "mean", "std", "loss", "best_loss", "past_loss", "z")
INTEGERS = {"active_ptr": "*u8", "key_ptr": "*i64", "ids_ptr": "*i64"}
INTEGERS |= {f"{n}_ptr": "*i32" for n in ("counters", "schedule", "decision", "kept")}
SCALARS = ("step_size", "eps", "lo", "hi", "mean", "std", "momentum", "rest", "rho")


def signature_of(kernel, storage: str) -> dict[str, str]:
    arithmetic = "fp64" if storage == "fp64" else "fp32"
    pointers = {f"{n}_ptr": f"*{arithmetic}" for n in NUMBERS} | INTEGERS
    return {
        n: pointers.get(n, f"*{storage}") if n.endswith("_ptr") else "fp64" if n in SCALARS else "i32"
        for n in kernel.arg_names
    }


def ptx(
    kernel, capability: int, storage: str, constants: dict[str, object], signature: dict[str, str] | None = None
) -> str:
    signature = signature or {n: POINTERS.get(n, f"*{storage}") for n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else kind for n, kind in signature.items()}
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


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize("storage", ["fp32", "fp64", "fp16", "bf16"])
def test_pgd_family_compiles(storage):
    from fastlip.ops._triton import apgd_step, pgd_step, random_start

    dtype = tl.float64 if storage == "fp64" else tl.float32
    flat, large = {"T": dtype, "BLOCK": 1024}, {"T": dtype, "SPAN": 8192, "BLOCK": 4096}
    unfed = dict.fromkeys(("input_ptr", "mean_ptr", "std_ptr"))
    free = dict.fromkeys(("step_size_ptr", "eps_ptr", "lo_ptr", "hi_ptr", "active_ptr"))
    cases = [
        (pgd_step._pgd_step_linf_kernel, flat),
        (pgd_step._pgd_step_linf_kernel, flat | free),
        (pgd_step._pgd_step_linf_kernel, flat | {"grad_ptr": None}),
        (pgd_step._pgd_step_ball_kernel, large | {"L2": True}),
        (pgd_step._pgd_step_ball_kernel, large | {"L2": False}),
        (pgd_step._pgd_step_ball_kernel, large | {"L2": True, "grad_ptr": None, "kept_ptr": None}),
        (pgd_step._pgd_step_ball_kernel, flat | free | {"L2": False, "SPAN": 1024, "kept_ptr": None}),
        (apgd_step._decide_kernel, flat | {"SPAN": 2048, "L1": True}),
        (apgd_step._decide_kernel, flat | {"SPAN": 2048, "L1": False}),
        (apgd_step._linf_kernel, flat),
        (apgd_step._start_kernel, flat | {"FED": False, "std_ptr": None}),
        (apgd_step._momentum_kernel, flat | {"HEAVY": True}),
        (apgd_step._finish_kernel, flat),
        *((random_start._random_start_kernel, flat | {"SPAN": 2048, "NORM": n}) for n in ("linf", "l2", "l1")),
    ]
    for kernel, constants in cases:
        known = {n: v for n, v in unfed.items() if n in kernel.arg_names} | constants
        assert ".entry" in ptx(kernel, 90, storage, known, signature_of(kernel, storage))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
def test_pgd_family_compiles_with_what_the_model_reads(storage):
    from fastlip.ops._triton import apgd_step, pgd_step

    flat, large = {"T": tl.float32, "BLOCK": 1024}, {"T": tl.float32, "SPAN": 8192, "BLOCK": 4096}
    cases = [
        (pgd_step._pgd_step_linf_kernel, flat),
        (pgd_step._pgd_step_linf_kernel, flat | {"mean_ptr": None, "std_ptr": None}),
        (pgd_step._pgd_step_ball_kernel, large | {"L2": True, "kept_ptr": None}),
        (pgd_step._pgd_step_ball_kernel, large | {"L2": False, "kept_ptr": None}),
        (apgd_step._linf_kernel, flat),
        (apgd_step._start_kernel, flat | {"FED": True}),
        (apgd_step._finish_kernel, flat),
    ]
    for kernel, constants in cases:
        signature = signature_of(kernel, "fp32") | {"grad_ptr": f"*{storage}", "input_ptr": f"*{storage}"}
        signature = {name: signature[name] for name in kernel.arg_names}
        text = ptx(kernel, 90, "fp32", constants, signature)
        assert text.count("div.rn.f32") >= 1, kernel  # no approximate quotient
        assert "div.full.f32" not in text
