"""fastlip._native: the same steps on NumPy arrays, without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from op_inputs import NORMS

from fastlip import _native, ops
from fastlip.ops import reference

DTYPES = [np.float16, np.float32, np.float64]


def arrays(shape: tuple[int, ...] = (3, 2, 5, 5), dtype: type = np.float32) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x0 = rng.random(shape)
    return tuple(a.astype(dtype) for a in (x0 + 0.3 * rng.standard_normal(shape), rng.standard_normal(shape), x0))


def test_torch_is_not_imported():
    code = "import sys; from fastlip import _native; _native.build_info(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_match_the_definition(norm, dtype):
    x, grad, x0 = arrays(dtype=dtype)
    eps, active = np.array([0.1, 0.4, 0.2]), np.array([True, True, False])
    low = np.linspace(0, 0.1, 2).reshape(2, 1, 1)
    x0 = np.maximum(x0, low.astype(dtype))
    got = x.copy()
    back = _native.pgd_step_(got, grad, x0, step_size=0.1, eps=eps, norm=norm, bounds=(low, 1.0), active=active)
    assert back is got
    want = torch.from_numpy(x.copy())
    arithmetic = reference.compute_dtype(want.dtype)
    reference.pgd_step_(
        want,
        torch.from_numpy(grad),
        torch.from_numpy(x0),
        0.1,
        None,
        0.0,
        torch.from_numpy(eps).to(arithmetic),
        norm,
        0.0,
        torch.from_numpy(low).to(arithmetic).expand(1, 2, 5, 5),
        1.0,
        None,
        0.99,
        torch.from_numpy(active),
    )
    atol = 0 if norm == "linf" else {np.float16: 1e-3, np.float32: 2.5e-7, np.float64: 1e-14}[dtype]
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=atol)
    projected = _native.project_(x.copy(), x0, eps=0.3, norm=norm)
    want = torch.from_numpy(x.copy())
    reference.project_(want, torch.from_numpy(x0), 0.3, None, norm, 0.0, None, 1.0, None, None)
    np.testing.assert_allclose(projected, want.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_those_of_the_torch_op(norm):
    _, _, x0 = arrays()
    ids = np.array([5, 6, 2**40])
    got = _native.random_start(x0, eps=0.2, norm=norm, ids=ids, key=123456789)
    want = torch.ops.fastlip.random_start(
        torch.from_numpy(x0), 0.2, None, norm, 0.0, None, 1.0, None, torch.from_numpy(ids), torch.tensor([123456789])
    )
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=0 if norm == "linf" else 3e-7)
    assert _native.random_start(x0, eps=0.2, key=0).shape == x0.shape


def test_empty():
    x = np.zeros((0, 3), np.float32)
    assert _native.pgd_step_(x, x, x, step_size=0.1, eps=0.1).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((3, 4), np.int32)}, TypeError, "x must be float16"),
        ({"x": np.zeros((3, 4), ">f2")}, TypeError, "native byte order"),
        ({"x": np.zeros((3, 8), np.float32)[:, ::2]}, ValueError, "x must be C-contiguous"),
        ({"x": np.array(1, np.float32)}, ValueError, "x must have a batch dimension"),
        ({"grad": np.zeros((3, 5), np.float32)}, ValueError, "grad must have x's shape"),
        ({"x0": np.zeros((3, 4))}, TypeError, "x0 must have x's dtype"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0"),
        ({"eps": np.ones(2)}, ValueError, "eps must be a float or have shape"),
        ({"step_size": float("nan")}, ValueError, "step_size must be finite"),
        ({"norm": "l3"}, ValueError, "norm must be one of"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds must satisfy"),
        ({"bounds": (np.zeros(7), 1.0)}, ValueError, "bounds must broadcast"),
        ({"sparsity": -0.1}, ValueError, "sparsity must lie in"),
        ({"active": np.ones(3)}, TypeError, "active must be a bool array"),
        ({"active": np.ones(2, bool)}, ValueError, "active must be contiguous"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    x, grad, x0 = arrays((3, 4))
    arguments = {"x": x, "grad": grad, "x0": x0, "step_size": 0.1, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        _native.pgd_step_(arguments.pop("x"), arguments.pop("grad"), arguments.pop("x0"), **arguments)


def test_read_only_arrays_are_refused():
    x, grad, x0 = arrays((3, 4))
    x.flags.writeable = False
    with pytest.raises(ValueError, match="x must be writeable"):
        _native.pgd_step_(x, grad, x0, step_size=0.1, eps=0.1)


def test_the_centre_must_not_move_with_the_iterate():
    x, grad, _ = arrays((3, 4))
    for x0 in (x, x[:]):
        with pytest.raises(ValueError, match="x0 must not share its memory with x"):
            _native.pgd_step_(x, grad, x0, step_size=0.1, eps=0.1, norm="l2")
        with pytest.raises(ValueError, match="x0 must not share its memory with x"):
            _native.project_(x, x0, eps=0.1)


def test_random_start_errors():
    _, _, x0 = arrays((3, 4))
    with pytest.raises(TypeError, match="ids must be an int64"):
        _native.random_start(x0, eps=0.1, ids=np.ones(3), key=0)
    with pytest.raises(ValueError, match="ids must have shape"):
        _native.random_start(x0, eps=0.1, ids=np.ones(2, np.int64), key=0)
    with pytest.raises(ValueError, match="eps must be finite"):
        _native.random_start(x0, eps=float("inf"), key=0)
    with pytest.raises(ValueError, match="bounds must satisfy"):
        _native.random_start(x0, eps=0.1, bounds=(1.0, 0.0), key=0)


def test_version_and_isa():
    info = _native.build_info()
    assert _native.cpu_isa() in info["cpu_isas"]
    assert ops.backends["cpu"].name in ("native", "triton", "reference")
