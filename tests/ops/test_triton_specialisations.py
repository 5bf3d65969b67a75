"""How often Triton compiles a kernel: once for its dtypes, whatever an image's size, its layout or the values given.

Every specialisation costs a user without nvcc about a second of compiling on first use.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_inputs import DTYPES, INTERPRETED, NORMS
from torch import Tensor

pytest.importorskip("triton")
from triton_launches import Key, counted, launch_apgd, launch_judge, launch_operator, launch_pgd, launch_start, recorded

from fastlip.ops import ConvGeometry

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted here")
LAUNCHES = {"pgd": launch_pgd, "apgd": launch_apgd, "start": launch_start}
#: Sizes that share all their kernels: what one block of a GPU holds, what a larger one holds, and beyond; each where
#: vectors cover the samples, and where they do not.
SIZES = {
    "small": [(2, 8), (4, 3, 16, 16), (1, 1, 28, 28), (64, 1024)],
    "small and odd": [(1, 1), (5,), (3, 7), (2, 3, 5, 5), (2, 67), (3, 1023)],
    "medium": [(2, 3, 32, 32), (128, 3, 32, 32), (1, 2048), (5, 4096)],
    "medium and odd": [(2, 2053), (1, 1027), (3, 4095)],
    "large": [(2, 3, 112, 112), (1, 3, 224, 224), (3, 5000)],
    "large and odd": [(2, 5003), (3, 3, 113, 113), (1, 4097)],
}
READ = [torch.float32, torch.float16, torch.bfloat16]
CONV = ConvGeometry(16, 24, 1, (3, 3), (8, 8), (8, 8), (1, 1), (1, 1), ((1, 1), (1, 1)))
#: Most specialisations of each kernel. Where the model reads x itself storage has four dtypes, else float32 alone and
#: what it reads three; kernels of elements know whether vectors cover float32 and 16-bit samples; the ball's have two
#: norms and three sizes.
MOST = {
    "_pgd_step_linf_kernel": 7 + 6,
    "_pgd_step_ball_kernel": 7 * 2 * 3,
    "_decide_kernel": 4,
    "_linf_kernel": 7 + 6,
    "_start_kernel": 7,
    "_momentum_kernel": 4,
    "_finish_kernel": 6,
    "_random_start_kernel": 4,
    "_judge_kernel": 2,
    "_operator_tile_kernel": 2 * 2,
    "_operator_squares_kernel": 1,
}


def asked(name: str, x: Tensor, norm: str, **values) -> set[Key]:
    with recorded() as keys:
        LAUNCHES[name](x, norm, **values)
    return keys


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_image_sizes_share_kernels(name, norm, sizes):
    first, *others = (asked(name, image(shape), norm) for shape in SIZES[sizes])
    assert first
    for other in others:
        assert other == first


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_further_sizes_compile_nothing(name, norm):
    """A user's every image size and batch, after six of them, is free."""
    known = set().union(*(asked(name, image(shapes[0]), norm) for shapes in SIZES.values()))
    for batch, size in ((1, 17), (7, 63), (100, 784), (256, 3072), (33, 12288), (9, 1536), (2, 40000), (3, 9999)):
        assert asked(name, image((batch, size)), norm) <= known
    if name == "start":
        assert len(known) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "read"), [("start", None), *((name, read) for name in ("pgd", "apgd") for read in (None, torch.float16))]
)
def test_numbers_and_tensors_share_kernels(name, read, norm):
    x = image((6, 3, 5, 7))
    fixed = {} if read is None else {"read": read}
    plain = asked(name, x, norm, **fixed)
    given = {"eps": torch.ones(6), "bounds": (x[:1].clone(), 1.0)}
    assert asked(name, x, norm, **fixed, **given) == plain
    assert asked(name, x, norm, **fixed, bounds=(x.clone(), x.clone() + 1)) == plain
    if name != "start":
        assert asked(name, x, norm, **fixed, active=torch.ones(6, dtype=torch.bool)) == plain
        yes = torch.ones(6, dtype=torch.bool)
        assert asked(name, x, norm, **fixed, saved=(x.clone(), yes, yes.clone())) == plain
        assert asked(name, x, norm, **fixed, saved=(None, None, yes)) == plain
    if name == "pgd":
        assert asked(name, x, norm, **fixed, step_size=torch.ones(6)) == plain
    if read is not None:
        assert asked(name, x, norm, **fixed, statistics=(x[:1].clone(), 1.0)) == plain
        assert asked(name, x, norm, **fixed, statistics=(0.0, x[:1] + 1)) == plain


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 3, 9, 7)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", LAUNCHES)
def test_layouts_and_addresses_share_kernels(name, norm, shape):
    """Beside vectors and no vectors."""
    x = image(shape)
    known = asked(name, x, norm) | asked(name, image((2, 67)), norm)
    size = x.numel()
    layouts = [
        x.to(memory_format=torch.channels_last),
        x.repeat_interleave(2, 0)[::2],
        x[1:],
        x[:1],
        torch.zeros(size + 1)[1:].reshape(shape),  # 4 bytes beyond an aligned address
    ]
    for layout in layouts:
        assert asked(name, layout, norm) <= known
    if name == "pgd":
        assert asked(name, x, norm, x0=x[:1].expand_as(x)) <= known
        odd = torch.zeros(size + 3)[3:].reshape(shape)
        assert asked(name, x, norm, grad=odd) | asked(name, x, norm, x0=odd) <= known


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operators_share_kernels(dtype):
    with recorded() as keys:
        launch_operator([CONV], dtype)
        first = set(keys)
        launch_operator([ConvGeometry(70, 33), CONV], dtype, vectors=5)
        launch_operator([ConvGeometry(1, 1)], dtype, vectors=1, recurrence=True)
        launch_operator([ConvGeometry(12, 20, 4)], dtype, mask=True, recurrence=True)
    assert keys == first
    assert counted(keys) == {"_operator_tile_kernel": 2, "_operator_squares_kernel": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classes_losses_and_records_share_a_kernel(dtype):
    with recorded() as keys:
        launch_judge(torch.zeros(64, 10, dtype=dtype))
        first = set(keys)
        for batch, classes in ((1, 2), (1, 16), (16, 1), (7, 1000), (256, 1024), (2, 21841)):
            logits = torch.zeros(batch, classes, dtype=dtype)
            some = torch.zeros(batch, dtype=torch.int64)
            for loss in ("dlr", "ce", "margin"):
                launch_judge(logits, loss)
                launch_judge(logits, loss, targets=some, record=True)
                launch_judge(logits, loss, toward=some, record=True, partly=True, early_stop=False)
        launch_judge(torch.zeros(64 * 10 + 1, dtype=dtype)[1:].reshape(64, 10))  # no aligned address
    assert keys == first
    assert counted(keys) == {"_judge_kernel": 1}


def test_all_there_is_to_compile():
    """Every dtype in every norm, size and layout, with numbers and tensors, and with what models read."""
    with recorded() as keys:
        for norm in NORMS:
            for shapes in SIZES.values():
                for shape in shapes[:2]:
                    for x in [image(shape, dtype) for dtype in DTYPES]:
                        eps = torch.ones(len(x))
                        for launch in LAUNCHES.values():
                            launch(x, norm)
                            launch(x, norm, eps=eps, bounds=(x[:1].clone(), 1.0))
                    for read in READ:
                        launch_pgd(image(shape), norm, read=read)
                        launch_apgd(image(shape), norm, read=read, statistics=(image(shape)[:1], 1.0))
        for dtype in (torch.float32, torch.float64):
            launch_operator([CONV], dtype)
            launch_judge(torch.zeros(4, 10, dtype=dtype))
    found = counted(keys)
    assert dict(found) == MOST
    assert found.total() <= 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tests_of_operators_compile_a_hundred_kernels_at_most():
    """Each launch of the tests in this folder, counted beside the reference that answers them."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_launches", "-p", "no:cacheprovider", str(here)]
    environment = os.environ | {"FASTLIP_BACKEND": "reference"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [environment.get("PYTHONPATH")])])
    out = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parents[1]).stdout
    count = re.search(r"^(\d+) specialisations", out, re.M)
    assert count, out[-2000:]
    assert re.search(r"\d+ passed", out), out[-2000:]
    assert 80 <= int(count[1]) <= 100
