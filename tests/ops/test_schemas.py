"""The schemas are spelled from groups of arguments; what is compiled against them needs every letter as it is."""

import importlib
import inspect

import pytest
import torch
from torch import Tensor

from fastlip.ops import _schemas, reference

_BALL = "float eps, Tensor? eps_tensor, str norm, float lo, Tensor? lo_tensor, float hi, Tensor? hi_tensor"
_READ = "Tensor({}!)? model_input=None, float mean=0., Tensor? mean_tensor=None, float std=1., Tensor? std_tensor=None"
_SAVED = "Tensor({}!)? best=None, Tensor? better=None, Tensor({}!)? not_finite=None"
#: As the compiled libraries implement them.
WANTED = {
    "pgd_step_": "(Tensor(a!) x, Tensor grad, Tensor x0, float step_size, Tensor? step_size_tensor, "
    f"{_BALL}, float sparsity, Tensor? active, {_READ.format('b')}, {_SAVED.format('c', 'd')}) -> ()",
    "project_": f"(Tensor(a!) x, Tensor x0, {_BALL}, Tensor? active) -> ()",
    "random_start": f"(Tensor x0, {_BALL}, Tensor ids, Tensor key) -> Tensor",
    "apgd_step_": "(Tensor(a!) x, Tensor grad, Tensor loss, Tensor x0, Tensor(b!) x_prev, Tensor(c!) x_best, "
    "Tensor(d!) grad_best, Tensor(e!) best_loss, Tensor(f!) past_loss, Tensor(g!) step_size, Tensor(h!) counters, "
    f"Tensor schedule, {_BALL}, float momentum, float rho, Tensor? active, {_READ.format('i')}, "
    f"{_SAVED.format('j', 'k')}) -> ()",
    "judge": "(Tensor logits, Tensor labels, Tensor? targets, Tensor? toward, str loss, float rounding, "
    "Tensor(a!)? best_loss=None, Tensor(b!)? succeeded=None, Tensor(c!)? unconfirmed=None, "
    "Tensor(d!)? best_doubtful=None, bool early_stop=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "operator_step_": "(Tensor(a!) out, Tensor(b!) out_square, Tensor x, Tensor? x_square, Tensor? previous, "
    "Tensor? previous_square, Tensor weights, Tensor problems, Tensor tiles, Tensor gather_groups, Tensor entries, "
    "int max_vectors, int parts, str matmul_precision, Tensor? active) -> ()",
    "pack_weights_": "(Tensor(a!) out, Tensor[] weights, int[] groups, bool adjoint) -> ()",
    "indirect_convs_": "(Tensor(a!)[] out, Tensor[] x, Tensor[] weight, Tensor[] table, int[] adjoint, Tensor[] bias, "
    "Tensor[] other, Tensor(b!)[] active, int[] relu) -> ()",
    "winograd_conv_": "(Tensor(a!) out, Tensor x, Tensor weight, bool adjoint, Tensor bias, Tensor other, "
    "Tensor(b!) active, bool relu) -> ()",
    "direct_conv_": "(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias, Tensor other, Tensor(b!) active, "
    "int[] stride, int[] padding, bool adjoint, bool relu) -> ()",
    "interleaved_layers_": "(Tensor(a!) out, Tensor x, Tensor[] weight, Tensor[] bias, int[] geometry, "
    "Tensor(b!) active, bool adjoint) -> ()",
    "norm_along": "(Tensor weight, Tensor left, Tensor right) -> Tensor",
    "scaled_weight_grad": "(Tensor grad, Tensor scaled, Tensor left, Tensor right, float norm, float bound) -> Tensor",
    "top_eigenpairs": "(Tensor diagonal, Tensor off_diagonal) -> (Tensor, Tensor)",
    "krylov_bound": "(Tensor diagonal, Tensor off_diagonal, Tensor last, Tensor residual, Tensor start_overlap, "
    "float tolerance) -> Tensor",
}


def arguments(name):
    return getattr(torch.ops.fastlip, name).default._schema.arguments


@pytest.mark.parametrize("name", WANTED)
def test_schemas_are_those_of_the_compiled_libraries(name):
    found = str(getattr(torch.ops.fastlip, name).default._schema)
    assert found == f"fastlip::{name}{WANTED[name]}"


def test_no_schema_is_left_out():
    assert WANTED.keys() == (_schemas.SCHEMAS | _schemas.HOST_SCHEMAS).keys()


@pytest.mark.parametrize("module", ["reference", "triton_kernels"])
@pytest.mark.parametrize("name", _schemas.SCHEMAS)
def test_implementations_take_the_arguments_of_the_schema(module, name):
    if module == "triton_kernels":
        pytest.importorskip("triton")
    function = getattr(importlib.import_module(f"fastlip.ops.{module}"), name)
    wanted = [(a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in arguments(name)]
    assert [(p.name, p.default) for p in inspect.signature(function).parameters.values()] == wanted


def test_groups_arrive_whole_however_their_fields_are_passed():
    @_schemas.takes_fields
    def operator(x: Tensor, ball: _schemas.Ball, active: Tensor | None, read: _schemas.Normalised) -> tuple:
        return x, ball, active, read

    x = torch.zeros(1)
    ball, read = _schemas.Ball(0.5, None, "l2", -1.0, x, 1.0, None), _schemas.Normalised(x, 0.5, None, 2.0, x)
    assert operator(x, *ball, None, *read) == (x, ball, None, read)
    assert operator(x, *ball, active=x, **read._asdict()) == (x, ball, x, read)
    assert operator(x, *ball, None) == (x, ball, None, (None, 0.0, None, 1.0, None))
    with pytest.raises(TypeError, match="missing a required argument: 'hi_tensor'"):
        operator(x, *ball[:-1])


def test_reference_is_registered_field_by_field():
    x, x0 = torch.rand(2, 3), torch.rand(2, 3)
    want = x.clone()
    torch.ops.fastlip.project_(want, x0, 0.1, None, "linf", 0.0, None, 1.0, None, None)
    reference.project_(x, x0, 0.1, None, "linf", 0.0, None, 1.0, None, active=None)
    assert torch.equal(x, want)
