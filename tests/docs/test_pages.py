"""The blocks of the pages in docs/, as they stand there."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

DOCS = Path(__file__).parents[2] / "docs"


def run(page, scope):
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```") // 2 > 0, "every block is Python, and is run"
    for block in blocks:
        exec(compile(block, str(DOCS / page), "exec"), scope)
    return scope


@pytest.mark.filterwarnings("ignore")
def test_evaluate(trained_cnn, tmp_path, capsys):
    pytest.importorskip("pandas")
    pytest.importorskip("tqdm")
    model, images, labels = trained_cnn
    scope = {"model": copy.deepcopy(model), "images": images[:8], "labels": labels[:8]}
    found = run("evaluate.md", scope | {"torch": torch, "folder": tmp_path})
    assert len(list(tmp_path.glob("adversarial-*.pt"))) == 1
    assert found["path"].exists()
    assert ((found["adversarial"] - images[:8]).abs() <= found["radius"] * found["mask"]).all()
    assert "8/8" in capsys.readouterr().err


def test_ten_lines_are_ten():
    block = re.search(r"## In ten lines\n\n```python\n(.*?)```", (DOCS / "evaluate.md").read_text(), re.DOTALL)
    assert 1 < len(block[1].splitlines()) <= 10


@pytest.mark.filterwarnings("ignore")
def test_adversarial_training(capsys):
    with torch.random.fork_rng(devices=[]):
        scope = run("adversarial_training.md", {})
        found = scope["found"]
        # The same network trained on the images themselves.
        plain = copy.deepcopy(scope["model"])
        for module in plain.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(plain.parameters(), 2e-3)
        for _ in range(5):
            scope["train_epoch"](plain, scope["loader"], optimizer, eps=0.0)
    images, labels = scope["images_of"](scope["test"])
    ball = {"norm": "linf", "eps": 2 / 255}
    standard = scope["attacks"].evaluate(plain, images, labels, scope["suite"], **ball)
    assert found.clean_accuracy > 0.3
    assert found.robust_accuracy > standard.robust_accuracy
    assert all(module.training for module in scope["model"].modules()), "training may go on"


def test_pages_link_to_what_is_there():
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"`((?:benchmarks|tests|docs)/[\w./]+)`", page.read_text()):
            assert (DOCS.parent / name).exists(), (page.name, name)


def test_what_is_refused(trained_cnn):
    """The page says that models of other outputs are refused, and that an average of models is a model."""
    from fastlip import attacks

    model, images, labels = trained_cnn
    maps = nn.Sequential(nn.Conv2d(3, 10, 1))
    with pytest.raises(ValueError, match=r"model must return logits \[B, C\]"):
        attacks.pgd(maps, images, labels, eps=0.1)
    average = lambda x: (model(x) + model(x.flip(3))) / 2  # noqa: E731
    found = attacks.pgd(average, images, labels, eps=0.3)
    assert (average(found).argmax(1) != labels).sum() > (average(images).argmax(1) != labels).sum()
