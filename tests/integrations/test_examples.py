"""The examples of fastlip/integrations/README.md, as they stand there."""

import re
from pathlib import Path

import pytest
import torch

import fastlip

PAGE = next(Path(folder) / "integrations" / "README.md" for folder in fastlip.__path__)
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_examples_run_in_order():
    for package in ("torchattacks", "foolbox", "art"):
        pytest.importorskip(package)
    scope = {}
    assert len(BLOCKS) >= 8
    with torch.random.fork_rng(devices=[]):
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), scope)
            for name in ("adversarial", "clipped"):
                made = torch.as_tensor(scope.get(name, scope["images"]))
                assert made.shape == scope["images"].shape
                assert made.isfinite().all()
    assert scope["success"].shape == (8,)
    assert 0 <= float(scope["info"]["autoattack_acc"]) <= 100
    assert scope["found"].robust_accuracy <= scope["found"].clean_accuracy
