"""Training and test images from one set that comes without a split, the same ones on every machine."""

from typing import Literal

import torch
from torch import Tensor

#: One image of so many is for testing.
_TEST_SHARE = 5

#: The seed of the split. It is fixed, so that no run is tested on what another was trained on.
_SEED = 0

#: How a report names the split.
SPLIT_IN_WORDS = f"split by fastlip, seed {_SEED}, a fifth of each class for testing"


def rows_of(split: Literal["train", "test"], labels: Tensor, classes: tuple[str, ...], name: str) -> Tensor:
    """Rows of the training or test images, in order: four fifths and a fifth of each class.

    Args:
        split: which of the two.
        labels: [N] int64 in [0, classes).
        classes: their names.
        name: of the set, for the error.

    Returns:
        [M] int64.

    Raises:
        ValueError: a class has fewer than two images.
    """
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    for title, count in zip(classes, counts, strict=True):
        if count < 2:
            raise ValueError(f"{name}: class {title} has {count} images, too few for training and testing")
    generator = torch.Generator().manual_seed(_SEED)
    tested = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(len(classes)):
        members = (labels == c).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        tested[members[: max(1, len(members) // _TEST_SHARE)]] = True
    return (tested if split == "test" else ~tested).nonzero().squeeze(1)
