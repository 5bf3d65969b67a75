"""The matmul precision of operator_step_: which values there are, and where they make no difference."""

import pytest
import torch
from test_operator_step import GEOMETRIES, HOST_CUDA, case, on_each

from fastlip import ops


@pytest.mark.skipif(HOST_CUDA, reason="the precision matters to the CUDA library")
def test_elsewhere_the_precision_changes_nothing():
    g = GEOMETRIES["3x3"]
    _, _, _, weights, x, _ = case([g], [3], False, torch.float32, "cpu")
    plan = ops.operator_plan([g], [3])
    found = [torch.zeros(3, dtype=torch.float64) for _ in ops.MATMUL_PRECISIONS]
    results = [
        ops.operator_step_(torch.zeros(plan.target_size), square, x, weights, plan, matmul_precision=precision)
        for precision, square in zip(ops.MATMUL_PRECISIONS, found, strict=True)
    ]
    assert torch.equal(*results)
    assert torch.equal(*found)


@on_each("float32")
def test_the_libraries_check_the_precision_too(device, precision):
    if ops.backends[device].name != "native":
        pytest.skip("needs the compiled library")
    plan = ops.operator_plan([GEOMETRIES["3x3"]], [1], device=device)
    sizes = (plan.target_size, plan.source_size, plan.weight_size)
    out, x, weights = (torch.zeros(size, device=device) for size in sizes)
    tables = (plan.problems, plan.tiles, plan.gather_groups, plan.entries, plan.max_vectors, plan.parts)
    square = torch.zeros(1, dtype=torch.float64, device=device)
    run = torch.ops.fastlip.operator_step_
    run(out, square, x, None, None, None, weights, *tables, precision, None)
    with pytest.raises(RuntimeError, match="matmul_precision must be float32 or 3xtf32, got tf32"):
        run(out, square, x, None, None, None, weights, *tables, "tf32", None)
