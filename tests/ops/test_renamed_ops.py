"""Former public names of the operators still work, and say which name has taken their place."""

import pytest
import torch

from fastlip import ops
from fastlip.ops import ConvGeometry

GEOMETRY = ConvGeometry(3, 2)


@pytest.mark.parametrize(("old", "new"), [("PRODUCTS", "MATMUL_PRECISIONS"), ("Products", "MatmulPrecision")])
def test_former_names_of_the_module(old, new):
    with pytest.warns(DeprecationWarning, match=rf"fastlip\.ops\.{old} is now {new}") as caught:
        assert getattr(ops, old) is getattr(ops, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match=rf"'fastlip\.ops' has no attribute '{old[:-1]}'"):
        getattr(ops, old[:-1])


def test_former_keywords():
    plan = ops.operator_plan([GEOMETRY], [4])
    with pytest.warns(DeprecationWarning, match=r"operator_plan\(chains=\) is now vectors=") as caught:
        former = ops.operator_plan([GEOMETRY], chains=[4])
    assert caught[0].filename == __file__
    assert torch.equal(former.problems, plan.problems)
    weights = ops.pack_weights([torch.ones(2, 3)], [1])
    out, square = torch.zeros(plan.target_size), torch.zeros(4, dtype=torch.float64)
    with pytest.warns(DeprecationWarning, match=r"operator_step_\(products=\) is now matmul_precision="):
        ops.operator_step_(out, square, torch.ones(12), weights, plan, products="float32")
    assert out.tolist() == [3.0] * 8
    ones = torch.ones(1, 1, dtype=torch.float64)
    numbers = dict.fromkeys(("last", "residual"), ones[0])
    with pytest.warns(DeprecationWarning, match=r"krylov_bound\(overlaps=\) is now start_overlap="):
        former = ops.krylov_bound(ones, ones, **numbers, overlaps=ones[0])
    assert torch.equal(former, ops.krylov_bound(ones, ones, **numbers, start_overlap=ones[0]))
    with pytest.raises(TypeError, match=r"operator_plan\(\) got both 'vectors' and its former name 'chains'"):
        ops.operator_plan([GEOMETRY], vectors=[4], chains=[4])


@pytest.mark.parametrize(
    ("old", "new"), [("chains", "vectors"), ("most_chains", "max_vectors"), ("bundles", "gather_groups")]
)
def test_former_attributes_of_a_plan(old, new):
    plan = ops.operator_plan([GEOMETRY], [4])
    with pytest.warns(DeprecationWarning, match=f"OperatorPlan.{old} is now {new}") as caught:
        assert getattr(plan, old) is getattr(plan, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match=f"OperatorPlan has no attribute '{old[:-1]}'"):
        getattr(plan, old[:-1])
