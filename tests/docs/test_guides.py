"""What the guides on evaluation and adversarial training, and the page of limits, promise beyond running."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlip import attacks

DOCS = Path(__file__).parents[2] / "docs"


def test_ten_lines_are_ten():
    page = (DOCS / "guides" / "evaluation.md").read_text()
    block = re.search(r"## In ten lines\n\n```python\n(.*?)```", page, re.DOTALL)
    assert 1 < len(block[1].splitlines()) <= 10
    assert "DataLoader" in block[1]
    assert "progress=True" in block[1]


@pytest.mark.filterwarnings("ignore")
def test_adversarial_training_makes_robust():
    page = DOCS / "guides" / "adversarial-training.md"
    scope = {}
    with torch.random.fork_rng(devices=[]):
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(block, str(page), "exec"), scope)
        # The same network trained on the images themselves.
        plain = copy.deepcopy(scope["model"])
        for module in plain.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        optimizer = torch.optim.Adam(plain.parameters(), 2e-3)
        for _ in range(5):
            scope["train_epoch"](plain, scope["loader"], optimizer, eps=0.0)
    images, labels = scope["images_of"](scope["test"])
    standard = attacks.evaluate(plain, images, labels, scope["suite"], norm="linf", eps=2 / 255)
    assert scope["found"].robust_accuracy > standard.robust_accuracy + 0.05
    assert all(module.training for module in scope["model"].modules()), "training may go on"


def test_other_outputs_are_refused_and_a_mean_of_models_is_a_model(trained_cnn):
    model, images, labels = trained_cnn
    with pytest.raises(ValueError, match=r"model must return logits \[B, C\]"):
        attacks.pgd(nn.Conv2d(3, 10, 1), images, labels, eps=0.1)
    mean = lambda x: (model(x) + model(x.flip(3))) / 2  # noqa: E731
    found = attacks.pgd(mean, images, labels, eps=0.3)
    assert (mean(found).argmax(1) != labels).sum() > (mean(images).argmax(1) != labels).sum()


def test_pages_name_files_that_are_there():
    for page in DOCS.glob("**/*.md"):
        for name in re.findall(r"`((?:benchmarks|tests|docs)/[\w./-]+\.\w+)`", page.read_text()):
            assert (DOCS.parent / name).exists(), (page.name, name)
