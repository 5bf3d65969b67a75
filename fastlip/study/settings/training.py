"""How networks are trained: the arms of the study, and the schedule of one training run."""

from dataclasses import dataclass
from typing import Literal

#: What a model is to the questions: a small network that "bigger" is relative to; trained from random weights; trained
#: from the source's weights; or a checkpoint that the study did not train.
Role = Literal["reference", "scratch", "transfer", "checkpoint"]

#: Small networks from scratch, which "bigger" is relative to: softmax regression, a perceptron with two hidden layers,
#: a ConvNet as in 2013, and ResNet-18.
REFERENCES = ("softmax", "mlp", "convnet", "resnet18")

#: Arms of the large network with random initial weights: the usual training; the same on disjoint training images; as
#: many training images seen in all as the source and the fine-tuning together; and the usual training with the norms of
#: all layers kept below a bound.
SCRATCH = ("scratch", "disjoint", "matched", "constrained")

#: Arms that start from the source. In this order they train all weights; the head; the last stage and the head; first
#: the head and then all weights.
TRANSFER = ("finetune", "linear", "partial", "lpft")

ARMS = (*REFERENCES, *SCRATCH, *TRANSFER)

#: Arms of which snapshots are measured: those that question 4 is about.
WITH_SNAPSHOTS = ("scratch", "finetune")


@dataclass(frozen=True)
class Schedule:
    """One training run by SGD with Nesterov momentum and the learning rates of ``OneCycleLR``.

    Attributes:
        images: number of training images, the same from each class.
        epochs: passes over the training images.
        batch_size: images per step.
        max_lr: largest learning rate.
        head_lr: factor of the learning rate for the last layer.
        warmup: fraction of the steps before the learning rate is largest.
        momentum: Nesterov momentum.
        weight_decay: of weights; biases and BatchNorm have none.
        label_smoothing: fraction of the target that is spread over all classes.
        crop: largest random shift in pixels; the border is reflected.
        flip: whether images are flipped horizontally half of the time.
        cutout: side of a square of pixels that is greyed out in each training image (DeVries and Taylor 2017); 0 for
            none.
        averaging: decay per step of the exponential moving average of the weights that is kept as the result (Polyak
            and Juditsky 1992); 0 keeps the last weights.
        snapshots: epochs after which the weights are kept, to be measured for question 4.
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
    cutout: int = 0
    averaging: float = 0.0
    snapshots: tuple[int, ...] = ()
