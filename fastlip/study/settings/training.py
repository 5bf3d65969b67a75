"""How networks are trained: the arms of the study, and the schedule of one training run."""

from dataclasses import dataclass

#: Arms that start from the source: all weights, the head alone, the last stage and the head, the head and then all.
TRANSFER = ("finetune", "linear", "partial", "lpft")

ARMS = ("reference", "scratch", *TRANSFER)

SOURCES = ("generated", "imagenet", "checkpoint", "folder")


@dataclass(frozen=True)
class Schedule:
    """One training run: SGD with Nesterov momentum, the learning rate by ``OneCycleLR``.

    Attributes:
        images: training images, the same number of each class.
        epochs: passes over them.
        batch_size: images per step.
        max_lr: peak of the learning rate.
        head_lr: learning rate of the last layer over that of the others.
        warmup: share of the steps before the peak.
        momentum: Nesterov momentum.
        weight_decay: applied to weights, not to biases and BatchNorm.
        label_smoothing: share of the target spread over all classes.
        crop: images are shifted by up to this many pixels, mirrored at the border.
        flip: whether images are mirrored left to right half of the time.
        snapshots: epochs after which the weights are kept and measured on their way, for question 4.
    """

    images: int
    epochs: int
    max_lr: float
    head_lr: float = 1 / 32
    batch_size: int = 64
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop: int = 3
    flip: bool = True
    snapshots: tuple[int, ...] = ()
