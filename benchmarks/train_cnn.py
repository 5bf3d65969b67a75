"""Small convolutional networks on CIFAR-10 for benchmarks of attacks: a plain one, and an adversarially trained one.

    FASTLIP_DATA=DIR python benchmarks/train_cnn.py plain.safetensors
    FASTLIP_DATA=DIR python benchmarks/train_cnn.py robust.safetensors --adversarial

Three convolutions with BatchNorm and two linear layers, 357,706 parameters, on 32x32 images in [0, 1]. The adversarial
one sees, in place of each image, what one step on the cross-entropy finds in Linf 4/255 from a random start (Wong et
al. 2020), so that robust accuracy at the usual small radii is neither 0 nor 1. A few minutes on one core each. The
checkpoint's metadata hold the settings, the accuracy on the test images and the CPU seconds.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlip import attacks
from fastlip.data import cifar10
from fastlip.models import Normalize, load_checkpoint, save_checkpoint

EPS = 4 / 255
BATCH = 128


def small_cnn() -> nn.Module:
    """The network; with random weights."""
    return nn.Sequential(
        Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        nn.Conv2d(3, 32, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def trained_cnn(path: Path) -> nn.Module:
    """The network in eval mode with the weights of a checkpoint."""
    model = small_cnn()
    model.load_state_dict(load_checkpoint(path)[0])
    return model.eval()


def test_images(data: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10's test images in [0, 1], [10000, 3, 32, 32] float32, and their labels, [10000] int64."""
    test = cifar10(data, train=False)
    return test.images.float().div(255), test.labels


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, C, H, W] uint8 as float32, each flipped or not and shifted by up to two pixels."""
    x = images.float().div(255)
    flip = torch.rand(len(x), generator=generator) < 0.5
    x[flip] = x[flip].flip(3)
    down, right = torch.randint(-2, 3, (2, 1), generator=generator).tolist()
    return F.pad(x, (2, 2, 2, 2)).roll((*down, *right), (2, 3))[:, :, 2:-2, 2:-2].contiguous()


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, adversarial: bool, seed: int) -> None:
    """SGD with momentum over one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(BATCH)[: len(images) // BATCH]:
            x, y = augmented(images[rows], generator), labels[rows]
            if adversarial:
                x = attacks.pgd(
                    model, x, y, norm="linf", eps=EPS, steps=1, step_size=1.25 * EPS, loss="ce", keep="last",
                    random_start=True, generator=generator,
                )  # fmt: skip
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total * epochs / steps:.3f}", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the file to write")
    parser.add_argument("--adversarial", action="store_true", help="train against Linf 4/255")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=50_000, help="how many training images to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = os.environ["FASTLIP_DATA"]
    model = small_cnn()
    images = cifar10(data, train=True)
    begin = time.process_time()
    train(
        model, images.images[: args.images], images.labels[: args.images], epochs=args.epochs,
        adversarial=args.adversarial, seed=args.seed,
    )  # fmt: skip
    seconds = time.process_time() - begin
    x, y = test_images(data)
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    meta = {"adversarial": args.adversarial, "epochs": args.epochs, "images": args.images, "seed": args.seed}
    meta |= {"accuracy": right / len(x), "cpu_s": round(seconds)}
    save_checkpoint(args.checkpoint, model, {k: str(v) for k, v in meta.items()})
    print(meta)


if __name__ == "__main__":
    main()
