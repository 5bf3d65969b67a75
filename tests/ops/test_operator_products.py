"""The ways that operator_step_ may multiply: what chooses them, and where they are one."""

import pytest
import torch
from test_operator_step import GEOMETRIES, HOST_CUDA, case, on_each

from fastlip import ops


@pytest.mark.skipif(HOST_CUDA, reason="the CUDA library multiplies in two ways")
def test_elsewhere_products_change_nothing():
    g = GEOMETRIES["3x3"]
    _, _, _, weights, x, _ = case([g], [3], False, torch.float32, "cpu")
    plan = ops.operator_plan([g], [3])
    found = [torch.zeros(3, dtype=torch.float64) for _ in ops.PRODUCTS]
    results = [
        ops.operator_step_(torch.zeros(plan.target_size), square, x, weights, plan, products=products)
        for products, square in zip(ops.PRODUCTS, found, strict=True)
    ]
    assert torch.equal(*results)
    assert torch.equal(*found)


@on_each("float32")
def test_the_libraries_check_products_too(device, products):
    if ops.backends[device].name != "native":
        pytest.skip("needs the compiled library")
    plan = ops.operator_plan([GEOMETRIES["3x3"]], [1], device=device)
    sizes = (plan.target_size, plan.source_size, plan.weight_size)
    out, x, weights = (torch.zeros(size, device=device) for size in sizes)
    tables = (plan.problems, plan.tiles, plan.bundles, plan.entries, plan.most_chains, plan.parts)
    square = torch.zeros(1, dtype=torch.float64, device=device)
    run = torch.ops.fastlip.operator_step_
    run(out, square, x, None, None, None, weights, *tables, products, None)
    with pytest.raises(RuntimeError, match="products must be float32 or 3xtf32, got tf32"):
        run(out, square, x, None, None, None, weights, *tables, "tf32", None)
