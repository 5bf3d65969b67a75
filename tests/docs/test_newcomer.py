"""What a newcomer types first: it works, or one line says what to do."""

import math
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import fastlip
from fastlip import attacks, ops
from fastlip._spoken import Spoken


@pytest.fixture(scope="module")
def case():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        images = torch.rand(6, 3, 6, 6)
    return model, images, model(images).argmax(1)


class OneSize(nn.Module):
    """Checks the size of its images as torchvision's vision transformers do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(27, 4)

    def forward(self, x):
        torch._assert(x.shape[-1] == 3, f"Wrong image width! Expected 3 but got {x.shape[-1]}!")
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("spelled", "norm"), [("Linf", "linf"), (math.inf, "linf"), ("L2", "l2"), (2, "l2"), (1, "l1")]
)
def test_norms_are_taken_as_other_libraries_spell_them(case, spelled, norm):
    for attack in (
        partial(attacks.pgd, eps=0.1, steps=2, random_start=False),
        partial(attacks.fgsm, eps=0.1),
        partial(attacks.apgd, eps=0.1, steps=2, random_start=False),
        lambda *call, norm: attacks.min_norm(*call, norm=norm, method="search", search_steps=2).adversarial,
    ):
        assert torch.equal(attack(*case, norm=spelled), attack(*case, norm=norm))
    x, grad = case[1], torch.ones_like(case[1])
    step = partial(ops.pgd_step, x, grad, x, step_size=0.1, eps=0.1)
    assert torch.equal(step(norm=spelled), step(norm=norm))
    assert torch.equal(
        ops.apgd_state(x, steps=3, eps=0.1, norm=spelled).step_size,
        ops.apgd_state(x, steps=3, eps=0.1, norm=norm).step_size,
    )
    suite = attacks.suite("quick", norm=spelled, eps=0.1)
    assert attacks.evaluate(*case, suite, norm=spelled, eps=0.1).attacks == ("pgd", "apgd-t")


@pytest.mark.parametrize("spelled", ["l3", 3, True, None, "linfinity", 0.5])
def test_unknown_norms_are_refused(case, spelled):
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got"):
        attacks.pgd(*case, norm=spelled, eps=0.1)
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1, got"):
        ops.pgd_step(case[1], case[1], case[1], step_size=0.1, eps=0.1, norm=spelled)


@pytest.mark.parametrize(
    "attack",
    [
        partial(attacks.pgd, eps=0.1, steps=1),
        partial(attacks.pgd, eps=0.1, steps=1, random_start=False),
        partial(attacks.fgsm, eps=0.1),
        partial(attacks.apgd, eps=0.1, steps=1),
        partial(attacks.square, eps=0.1, queries=1),
        attacks.min_norm,
    ],
    ids=lambda attack: getattr(attack, "func", attack).__name__,
)
def test_labels_that_are_not_the_models_are_told(case, attack):
    model, images, labels = case
    with pytest.warns(attacks.AttackWarning, match=r"[45] of 6 images are misclassified to begin with") as told:
        attack(model, images, torch.where(torch.arange(6) < 4, (labels + 1) % 5, labels))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(model, images, torch.where(torch.arange(6) < 3, (labels + 1) % 5, labels))
        attack(model, images[:2], (labels[:2] + 1) % 5)
        if getattr(attack, "func", None) is not attacks.square:
            attack(model, images, labels, targets=labels)


def test_an_evaluation_tells_it_once_and_keeps_it(case):
    model, images, labels = case
    call = partial(attacks.evaluate, model, images, (labels + 1) % 5, {"pgd": partial(attacks.pgd, eps=0.1)})
    with pytest.warns(attacks.AttackWarning, match="6 of 6 images are misclassified") as told:
        found = call()
    assert len(told) == len(found.warnings) == 1
    assert not call(criterion=lambda logits, labels: labels < 9, check=False).warnings


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8), ("linf", 1.01), ("l2", 10.5), ("l1", 109)])
def test_a_ball_beyond_the_box_is_told(case, norm, eps):
    for attack in (
        partial(attacks.pgd, steps=1), partial(attacks.apgd, steps=1), attacks.fgsm, partial(attacks.square, queries=1)
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=rf"eps={eps:g} allows any image within bounds \(0, 1\)") as told:
            attack(*case, norm=norm, eps=eps)
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacks.pgd(*case, norm=norm, eps={"linf": 1, "l2": 10, "l1": 108}[norm], steps=1)
        attacks.pgd(*case, norm=norm, eps=math.inf, steps=1, step_size=0.1, random_start=False)


@pytest.mark.parametrize(
    "attack",
    [
        partial(attacks.pgd, eps=0.1), partial(attacks.square, eps=0.1), attacks.min_norm, attacks.min_sigma,
        attacks.diagnose, partial(attacks.evaluate, attacks={}),
    ],
)  # fmt: skip
def test_missing_labels_are_named(case, attack):
    with pytest.raises(TypeError, match=r"labels must be given; those of the model itself are model\(inputs\)"):
        attack(case[0], case[1], None)


def test_images_of_a_wrong_size_are_named():
    model, x = OneSize().eval(), torch.rand(2, 3, 5, 5)
    for call in (
        lambda: attacks.pgd(model, x, torch.tensor([0, 1]), eps=0.1),
        lambda: attacks.min_sigma(model, x, torch.tensor([0, 1])),
        lambda: fastlip.local_lipschitz(model, x),
        lambda: fastlip.layer_norms(model, (3, 5, 5)),
        lambda: fastlip.lipschitz_bound(model, (3, 5, 5)),
    ):
        with pytest.raises(
            ValueError, match=r"does not run on .*3, 5, 5\].*: Wrong image width! Expected 3 but got 5!"
        ):
            call()


def test_conv_norm_takes_convolutions():
    for module in (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv1d(4, 4, 3, groups=2, dilation=2)):
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        assert fastlip.conv_norm(module, 9) == fastlip.conv_norm(module.weight, 9, **settings)
    up = nn.ConvTranspose2d(2, 3, 3, stride=2)
    assert fastlip.conv_norm(up, (4, 5)).upper == fastlip.layer_norms(nn.Sequential(up), (2, 4, 5))["0"].upper
    with pytest.raises(TypeError, match="stride, padding, dilation, groups and padding_mode are those of the module"):
        fastlip.conv_norm(up, 4, padding=1)
    with pytest.raises(TypeError, match="a floating-point tensor or a convolution, got Linear; see layer_norms"):
        fastlip.conv_norm(nn.Linear(2, 2), 4)
    for size in ((4, 4, 4), (4,), 0, "44"):
        with pytest.raises(ValueError, match="input_size must be an integer >= 1 or 2 of them"):
            fastlip.conv_norm(nn.Conv2d(2, 2, 3), size)


def test_a_batch_in_place_of_a_shape_is_named(case):
    model, images, _ = case
    for call in (fastlip.layer_norms, fastlip.lipschitz_bound):
        with pytest.raises(TypeError, match=r"input_shape must be the shape of one input, such as \(3, 6, 6\)"):
            call(model, images)


def test_subpackages_are_attributes():
    code = "import fastlip; print(fastlip.study.__name__, fastlip.integrations.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fastlip.study", "fastlip.integrations"]
    assert {"study", "integrations"} <= set(dir(fastlip))


def test_a_bare_checkout_says_to_install():
    code = """
import importlib.metadata

def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = absent
import fastlip
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: fastlip is not installed: run `pip install .` in its source folder"


def test_progress_takes_a_class_of_tqdm(case, capsys):
    tqdm = pytest.importorskip("tqdm")
    attacks.evaluate(*case, {"first": partial(attacks.fgsm, eps=0.01)}, progress=tqdm.tqdm)
    assert "first: 100%" in capsys.readouterr().err


def test_long_work_speaks_now_and_then(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    spoken = Spoken(lines.append, silent=False)
    for now[0] in (30.0, 59.0, 61.0, 100.0, 121.5):
        spoken(f"at {now[0]:g}")
    assert lines == ["at 61", "at 121.5"]
    now[0] = 170.0
    spoken.said()
    now[0] = 200.0
    spoken("too early")
    silent = Spoken(lines.append, silent=True)
    now[0] = 900.0
    silent("a bar is shown")
    assert lines == ["at 61", "at 121.5"]


def test_a_model_may_be_named_by_its_file(tmp_path):
    (tmp_path / "beside_it.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (tmp_path / "own_net.py").write_text(
        "from beside_it import layer, nn\nclass Net(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(layer(3, 2))\n"
    )
    command = [sys.executable, "-m", "fastlip.norms", f"{tmp_path}/own_net.py:Net", "--input", "3", "--csv", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("0,Linear 3→2,")
    command[3] = f"{tmp_path}/no_net.py:Net"
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"error: there is no file {tmp_path}/no_net.py\n")


def test_torchs_own_deprecations_are_not_shown():
    code = """
import fastlip, torch
fastlip.local_lipschitz(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU()), torch.rand(2, 3))
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch.jit.script" not in done.stderr
