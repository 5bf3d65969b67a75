"""Every public function takes what the field hands it, and refuses the rest by the name that the caller knows."""

import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastlip import attacks
from fastlip.attacks import _arguments

BALL = {"eps": 0.05}
#: Attacks by name, with the arguments that they need beside model, images and labels.
ATTACKS = {
    "pgd": (attacks.pgd, BALL | {"steps": 3}),
    "fgsm": (attacks.fgsm, BALL),
    "apgd": (attacks.apgd, BALL | {"steps": 3}),
    "square": (attacks.square, BALL | {"queries": 3}),
    "min_norm": (attacks.min_norm, {"steps": 2, "search_steps": 2, "fmn_steps": 2, "method": "both"}),
    "min_sigma": (attacks.min_sigma, {"directions": 2, "levels": 3}),
}
FUNCTIONS = ATTACKS | {
    "diagnose": (attacks.diagnose, {}),
    "evaluate": (attacks.evaluate, {"attacks": {}, "norm": "linf", "eps": 0.1}),
    "gaussian_noise": (attacks.gaussian_noise, {"sigma": 0.1}),
    "prepare": (attacks.prepare, {}),
}

nan, inf = math.nan, math.inf
B = 4
#: On another device than the images.
ELSEWHERE = torch.zeros(B, device="meta")
WRONG = {
    "model": [None, "x", 3, nn.Linear],
    "inputs": [None, "x", [1.0], np.zeros((B, 6), np.float32), torch.zeros(B, 6, dtype=torch.int64), torch.tensor(0.5),
               torch.zeros(B, 6, dtype=torch.complex64), torch.zeros(B, 6).to_sparse()],
    "labels": [None, "x", [0] * B, np.zeros(B, np.int64), torch.zeros(B), torch.zeros(B, dtype=torch.bool),
               torch.zeros(B, 1, dtype=torch.int64), torch.full((B,), 9), torch.full((B,), -1), torch.tensor(0)],
    "start": ["x", torch.zeros(3), torch.zeros(B, 6, dtype=torch.int64), torch.full((B, 6), nan),
              ELSEWHERE[:, None].expand(B, 6)],
    "targets": ["x", [0] * B, torch.zeros(B), torch.zeros(3, dtype=torch.int64), torch.full((B,), 9), ELSEWHERE.long()],
    "active": ["x", [True] * B, torch.ones(B), torch.ones(3, dtype=torch.bool)],
    "ids": ["x", [0] * B, torch.zeros(B), torch.zeros(3, dtype=torch.int64)],
    "norm": [None, "x", 3, ["linf"], True],
    "eps": ["x", [0.1], True, 1j, -0.1, nan, torch.ones(3), torch.ones(B, dtype=torch.bool), torch.full((B,), nan),
            torch.full((B,), -1.0), np.full(B, 0.1), np.float32(-1), torch.tensor(nan), ELSEWHERE],
    "eps_max": ["x", [0.1], True, -0.1, nan, torch.ones(3), torch.full((B,), nan)],
    "sigma": ["x", [0.1], True, -0.1, nan, inf, torch.ones(3), torch.full((B,), inf)],
    "step_size": ["x", [0.1], True, nan, inf, torch.ones(3), torch.full((B,), nan)],
    "bounds": [None, 1.0, "01", (0.0,), (0.0, 1.0, 2.0), (0.0, "x"), (0.0, None), (False, True), (1.0, 0.0), (nan, 1.0),
               (torch.zeros(B, 6), np.ones((B, 6))), (torch.zeros(7), 1.0), (torch.zeros(3, 6), 1.0),
               (torch.ones(B, 6), torch.zeros(B, 6)), (torch.full((6,), nan), 1.0), (0.0, torch.ones(2, B, 6)),
               (torch.zeros(B, 6, dtype=torch.bool), 1.0), torch.tensor([0.0, 1.0])],
    "steps": ["x", 2.5, -1, True, None, [3]],
    "search_steps": ["x", 2.5, 0], "fmn_steps": ["x", 2.5, 0],
    "queries": ["x", 2.5, 0], "restarts": ["x", 1.5, 0, None], "target_classes": ["x", 1.5, -1],
    "directions": ["x", 2.5, 0], "levels": ["x", 2.5, 1], "halvings": ["x", 2.5, -1],
    "sigma_max": ["x", None, nan, inf, -1.0], "sigma_min": ["x", None, nan, 0.0],
    "share": ["x", None, nan, 0.0, 1.5], "sparsity": ["x", None, nan, -0.5, 1.5],
    "momentum": ["x", None, nan, 1.5], "rho": ["x", None, nan, -0.5], "tolerance": ["x", None, nan, -0.5],
    "loss": [None, "x", 3, ["ce"], torch.zeros(2), nn.CrossEntropyLoss],
    "keep": [None, "x", ["best"]], "method": [None, "x", ["fmn"]],
    "random_start": ["x", None, 1], "early_stop": ["x", None, 1], "larger_eps": ["x", 1],
    "fast": ["x", None, 1], "check": ["x", None], "every_attack": ["x", None], "progress": ["x", None],
    "precision": ["x", 16, torch.float64, torch.zeros(2)],
    "generator": ["x", 0],
    "batch_size": ["x", 2.5, 0, None, True], "seed": ["x", 2.5, None, 2**64],
    "device": ["x", 1.5, []],
    "attacks": [[attacks.pgd], {"pgd": 3}],
    "quantize": ["x", 2.5, 0, 17, True], "callback": ["x", 3],
    "draws": ["x", 0, 1.5], "eot": ["x", 0, 1.5], "same_size": ["x", 1],
}  # fmt: skip


def call(name, **change):
    torch.manual_seed(0)
    function, options = FUNCTIONS[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))
    inputs = 0.4 + 0.2 * torch.rand(B, 6)
    given = {"model": model, "inputs": inputs, "labels": model(inputs).argmax(1)} | options | change
    known = inspect.signature(function).parameters
    return function(**{k: v for k, v in given.items() if k in known or k in change})


def cases():
    for name, (function, _) in FUNCTIONS.items():
        for argument, values in WRONG.items():
            # The norm of noise is a length: see below.
            if argument in inspect.signature(function).parameters and (name, argument) != ("gaussian_noise", "norm"):
                for position, value in enumerate(values):
                    yield pytest.param(name, argument, value, id=f"{name}-{argument}-{position}")


@pytest.mark.parametrize(("name", "argument", "value"), list(cases()))
def test_wrong_values_are_refused_by_the_argument_s_name(name, argument, value):
    if name == "evaluate" and argument == "norm" and value is None:
        wanted = "give both norm and eps"
    elif argument in ("sigma_max", "sigma_min"):
        wanted = rf"({argument}|sigma_min and sigma_max) must "
    elif argument == "sigma" and value is None:
        wanted = "give either sigma or norm"
    else:
        wanted = rf"{argument} (must|hold)"
    beside = {"random_start": False} if argument == "start" else {}
    with pytest.raises((TypeError, ValueError)) as caught:
        call(name, **{argument: value}, **beside)
    assert re.match(wanted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", [*ATTACKS, "evaluate", "diagnose"])
def test_labels_targets_and_ids_of_any_integer_type(name, dtype):
    given = {"labels": torch.tensor([0, 1, 2, 3])}
    known = inspect.signature(FUNCTIONS[name][0]).parameters
    given |= {k: torch.tensor([3, 2, 1, 0]) for k in ("targets", "ids") if k in known}
    attack = {"attacks": {"pgd": attacks.pgd}} if name == "evaluate" else {}
    attack = {"attacks": {"pgd": lambda model, x, y: attacks.pgd(model, x, y, eps=0.1)}} if attack else {}

    def result(change):
        found = call(name, **change, **attack)
        return getattr(found, "adversarial", found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attacks.AttackWarning)
        found, want = (result(change) for change in ({k: t.to(dtype) for k, t in given.items()}, given))
    assert torch.equal(found, want) if isinstance(want, torch.Tensor) else found == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*ATTACKS, "gaussian_noise", "evaluate", "diagnose"])
def test_what_lies_outside_by_rounding_is_clipped(name, dtype):
    """As undoing a normalisation leaves it; what is further out is refused."""
    eps = torch.finfo(dtype).eps
    inputs = (0.4 + 0.2 * torch.rand(B, 6)).to(dtype)
    inputs[0, 0], inputs[1, 1] = -eps / 4, 1 + eps
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5)).to(dtype)
    beside = {} if name == "gaussian_noise" else {"model": model, "labels": torch.zeros(B, dtype=torch.int64)}
    found = call(name, inputs=inputs, **beside)
    found = getattr(found, "adversarial", found)
    if isinstance(found, torch.Tensor):
        assert found.min() >= 0
        assert found.max() <= 1
    inputs[0, 0] = -8 * eps
    with pytest.raises(ValueError, match="inputs must lie within bounds"):
        call(name, inputs=inputs, **beside)
    for bounds in ((0.0, inf), (0.0, 1.0 + torch.zeros(6, dtype=dtype))):
        with pytest.raises(ValueError, match="inputs must lie within bounds"):
            call(name, inputs=inputs, bounds=bounds, **beside)


@pytest.mark.parametrize("value", ["x", None, True, nan, -1.0, [1.0]])
def test_gaussian_noise_of_a_wrong_length(value):
    with pytest.raises((TypeError, ValueError), match=r"norm must|give either"):
        call("gaussian_noise", sigma=None, norm=value)


@pytest.mark.parametrize("name", ["pgd", "fgsm", "apgd", "square"])
@pytest.mark.parametrize("infinite", [inf, torch.tensor([0.1, inf, 0.1, 0.1])])
def test_what_an_infinite_radius_would_spoil_is_the_radius_s_fault(name, infinite):
    """Not the step size's, which nobody gave."""
    with pytest.raises(ValueError, match=r"^eps must be finite .*, got inf"):
        call(name, eps=infinite)


@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_an_infinite_radius_leaves_the_box(name):
    found = call(name, eps=inf, step_size=0.3, random_start=False)
    assert found.min() >= 0
    assert found.max() <= 1


SCALARS = [np.float32, np.float64, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)]


@pytest.mark.parametrize("scalar", SCALARS, ids=["float32", "float64", "array", "tensor", "tensor64"])
@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("prepare", "diagnose", "min_sigma")])
def test_scalars_of_other_libraries_are_numbers(name, scalar):
    argument = {"min_norm": "eps_max", "gaussian_noise": "sigma"}.get(name, "eps")
    bounds = (scalar(0.0), scalar(1.0))
    seeds = [{"generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    if name in ("fgsm", "min_norm", "evaluate"):
        seeds = [{}, {}]
    want = call(name, **{argument: float(scalar(0.3))}, **seeds[0])
    found = call(name, **{argument: scalar(0.3)}, bounds=bounds, **seeds[1])
    for one, other in ((want, found), (getattr(want, "adversarial", want), getattr(found, "adversarial", found))):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


def test_counts_of_other_libraries_are_ints():
    want = call("pgd", steps=4, random_start=False)
    for steps in (np.int64(4), np.array(4), torch.tensor(4)):
        assert torch.equal(call("pgd", steps=steps, random_start=False), want)
    assert torch.equal(call("pgd", steps=4, random_start=np.bool_(False)), want)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_larger_balls_need_no_number_of_steps(steps, norm):
    eps = {"linf": 0.05, "l2": 0.1, "l1": 0.2}[norm]
    for start in (True, False):
        call_ = {"norm": norm, "eps": eps, "steps": steps, "larger_eps": True, "random_start": start}
        found, inputs = call("apgd", **call_, keep="last"), call("pgd", eps=0.0)
        length = torch.linalg.vector_norm((found - inputs).double(), {"linf": inf, "l2": 2, "l1": 1}[norm], dim=1)
        assert (length <= eps * (1 + 1e-5)).all()
        assert (length > 0).any() == (steps > 0 or start)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "min_norm"])
def test_warnings_name_the_attack_and_the_caller_s_line(name):
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5))

    def model(x):
        # sqrt has an infinite slope at 0, which meets the zero slope of the difference.
        return network(x) + (x - x).abs().sqrt().sum(1, keepdim=True)

    inputs = torch.rand(B, 6)
    function, options = ATTACKS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(model, inputs, model(inputs).argmax(1), **options)
    assert [str(w.message).split()[0] for w in caught] == [name]
    assert caught[0].filename == __file__


def test_networks_and_suites_are_checked():
    for wrong in (None, 3, nn.Linear):
        with pytest.raises(TypeError, match=r"^model must be"):
            attacks.Network(wrong)
    with pytest.raises(TypeError, match=r"^faster must"):
        attacks.Network(nn.Flatten(), 3)
    with pytest.raises(TypeError, match=r"^rounding must"):
        attacks.Network(nn.Flatten(), None, "x")
    for change, message in (
        ({"norm": "l0"}, "norm must"),
        ({"norm": ["l2"]}, "norm must"),
        ({"eps": "x"}, "eps must"),
        ({"eps": -1.0}, "eps must"),
        ({"name": ["standard"]}, "suite must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            attacks.suite(**{"name": "standard", "eps": 0.1} | change)


def test_messages_are_short_whatever_was_given():
    assert len(_arguments.shown("x" * 10_000)) < 100
    assert _arguments.shown(torch.zeros(2, 3)) == "a torch.float32 tensor of shape [2, 3]"
    assert _arguments.shown(np.zeros(3)) == "ndarray"


class NeverEmpty(nn.Module):
    """As many are: ``view`` cannot tell what -1 means without images."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(27, 4)

    def forward(self, x):
        return self.linear(x.view(len(x), -1))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("bounds", ["floats", "empty", "first", "channels", "lower"])
def test_no_images(name, norm, bounds):
    function, options = FUNCTIONS[name]
    x = torch.zeros(0, 3, 3, 3)
    box = {
        "floats": (0.0, 1.0),
        "empty": (x.clone(), x.clone()),
        "first": (torch.zeros(1, 3, 3, 3), torch.ones(1, 3, 3, 3)),
        "channels": (torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
        "lower": (x.clone(), 1.0),
    }[bounds]
    none = torch.zeros(0)
    given = {"model": NeverEmpty(), "inputs": x, "labels": none.long(), "bounds": box, "norm": norm} | options
    if name == "evaluate":
        suite = {n: (lambda m, a, b, f=f, o=o: f(m, a, b, **o)) for n, (f, o) in ATTACKS.items()}
        given |= {"attacks": suite, "norm": norm}
    known = inspect.signature(function).parameters
    if name == "gaussian_noise":
        del given["sigma"]
        given["norm"] = none
    elif "norm" in known and "eps" in options and name != "evaluate":
        given["eps"] = none
    found = function(**{k: v for k, v in given.items() if k in known})
    images = getattr(found, "adversarial", found)
    if name not in ("diagnose", "prepare"):
        assert images.shape == x.shape
    for fast in (True, False):
        if "fast" in known:
            function(**{k: v for k, v in (given | {"fast": fast}).items() if k in known})


@pytest.mark.parametrize("method", ["search", "fmn", "both"])
def test_all_images_misclassified_or_left_out_leave_nothing_to_ask(method):
    model = NeverEmpty()
    inputs = torch.rand(3, 3, 3, 3)
    labels = (model(inputs).argmax(1) + 1) % 4
    found = attacks.min_norm(model, inputs, labels, method=method)
    assert found.distance.tolist() == [0.0] * 3
    found = attacks.min_norm(model, inputs, labels, method=method, active=torch.zeros(3, dtype=torch.bool))
    assert not found.found.any()
    for function, options in ATTACKS.values():
        images = function(model, inputs, labels, **options)
        assert torch.equal(getattr(images, "adversarial", images), inputs)
