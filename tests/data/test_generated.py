import pytest
import torch

from fastlip import data


def test_the_same_arguments_give_the_same_images():
    one, other = (data.generated("target", "train", 100, seed=3) for _ in range(2))
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.labels, other.labels)
    assert one.generated
    assert "generated" in one.name


@pytest.mark.parametrize("change", [{"task": "source"}, {"split": "test"}, {"seed": 4}])
def test_tasks_splits_and_seeds_share_no_image(change):
    call = {"task": "target", "split": "train", "n": 60, "seed": 3}
    one, other = data.generated(**call), data.generated(**(call | change))
    first = {image.numpy().tobytes() for image in one.images}
    assert len(first) == 60
    assert not first & {image.numpy().tobytes() for image in other.images}


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    data.generated("source", "test", 10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("task", "n"), [("source", 121), ("target", 60), ("target", 3000)])
def test_images_are_valid_and_balanced(task, n):
    found = data.generated(task, "train", n)
    assert found.images.shape == (n, 3, 32, 32)
    counts = torch.bincount(found.labels, minlength=len(found.classes))
    assert counts.max() - counts.min() <= 1
    assert found.images.float().flatten(1).std(1).min() > 2  # no image is blank
    # Labels are shuffled: neighbours agree no more often than chance.
    assert (found.labels[1:] == found.labels[:-1]).float().mean() < 2.5 / len(found.classes)


def test_tasks_have_different_classes():
    source, target = data.generated("source", "train", 12), data.generated("target", "train", 12)
    assert not set(source.classes) & set(target.classes)


def test_form_and_colour_both_tell_something_and_neither_tells_all():
    """Ridge regression on features that hold only one of the two, beside chance (1/6)."""
    train, test = data.generated("target", "train", 2000), data.generated("target", "test", 600)

    def score(features):
        a, b = features(train.images), features(test.images)
        mean, std = a.mean(0), a.std(0) + 1e-6
        a, b = (a - mean) / std, (b - mean) / std
        onehot = torch.nn.functional.one_hot(train.labels, 6).float()
        weight = torch.linalg.solve(a.T @ a + 100 * torch.eye(a.shape[1]), a.T @ onehot)
        return ((b @ weight).argmax(1) == test.labels).float().mean().item()

    def form(images):
        grey = images.float().mean(1) / 255
        return torch.fft.rfft2(grey - grey.mean((1, 2), keepdim=True)).abs()[:, :, :12].flatten(1).log1p()

    def colour(images):
        chroma = images.float() / 255 - images.float().mean(1, keepdim=True) / 255
        pooled = torch.nn.functional.avg_pool2d(chroma[:, :, 8:24, 8:24], 16).flatten(1)
        return torch.cat([pooled, pooled.square(), pooled.abs()], 1)

    assert 0.25 < score(form) < 0.9
    assert 0.35 < score(colour) < 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [(("sauce", "train", 5), "task must"), (("source", "val", 5), "split must"), (("source", "train", 0), "n must")],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        data.generated(*call)
