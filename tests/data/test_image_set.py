import pytest
import torch

from fastlip import data


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pixels = torch.randint(0, 256, (90, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return data.ImageSet(pixels, labels, ("a", "b", "c"), "toy", True)


def test_subset_keeps_the_rest(images):
    part = images.subset(torch.tensor([5, 1]))
    assert torch.equal(part.images, images.images[[5, 1]])
    assert part.labels.tolist() == [2, 1]
    assert (part.classes, part.name, part.generated) == (images.classes, "toy", True)
    assert len(images.subset(images.labels == 0)) == 30


def test_balanced_subsets_are_balanced_nested_and_repeatable(images):
    subsets = [images.balanced(n, seed=5) for n in (7, 30, 90)]
    for part, n in zip(subsets, (7, 30, 90), strict=True):
        counts = torch.bincount(part.labels, minlength=3)
        assert len(part) == n
        assert counts.max() - counts.min() <= 1
    seen = [{image.numpy().tobytes() for image in part.images} for part in subsets]
    assert seen[0] < seen[1] < seen[2]
    assert torch.equal(images.balanced(30, seed=5).images, subsets[1].images)
    assert not torch.equal(images.balanced(30, seed=6).images, subsets[1].images)
    with pytest.raises(ValueError, match="a class has 30"):
        images.balanced(91)
    with pytest.raises(ValueError, match="at least 0, got -1 and 0"):
        images.balanced(-1)


def test_balanced_after_others_shares_no_image_with_them(images):
    first, rest = images.balanced(31, seed=5), images.balanced(40, seed=5, after=31)
    seen = [{image.numpy().tobytes() for image in part.images} for part in (first, rest)]
    assert len(seen[0] | seen[1]) == 71
    assert seen[0] | seen[1] == {image.numpy().tobytes() for image in images.balanced(71, seed=5).images}
    counts = torch.bincount(rest.labels, minlength=3)
    assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="n = 91 images"):
        images.balanced(45, after=46)
    with pytest.raises(ValueError, match="at least 0, got 1 and -1"):
        images.balanced(1, after=-1)


def test_batches_are_scaled_and_complete(images):
    batches = list(images.batches(40))
    assert [len(x) for x, _ in batches] == [40, 40, 10]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.images / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)
    assert batches[0][0].dtype == torch.float32
    with pytest.raises(ValueError, match="batch_size"):
        next(images.batches(0))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "images must be"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels must be"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), "labels must lie"),
    ],
)
def test_errors_name_the_field(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        data.ImageSet(pixels, labels, ("a", "b"), "toy")
