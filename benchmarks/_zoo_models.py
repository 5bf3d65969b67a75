"""The models of zoo.py: fixed lists, and how each is built with random weights."""

import csv
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIST = Path(__file__).with_name("zoo_models.csv")


@dataclass(frozen=True)
class Entry:
    """One model of the list.

    Attributes:
        family: the library, by its name for pip.
        name: as the library calls it.
        size: height and width of its input: 64 where the architecture runs on that, else the least of 96, 128 and its
            own that it runs on; 32 for CIFAR-10.
    """

    family: str
    name: str
    size: int


def entries() -> list[Entry]:
    """The fixed list.

    torchvision: all classification models. timm 1.0.31: one architecture, a small one, of each module that defines
    classifiers; without the image encoders of three language models. RobustBench 1.1.1, CIFAR-10: the definitions that
    differ in more than their weights, over all three threat models, and then in the order of the Linf leaderboard up to
    65. transformers 5.24: classifiers by ``AutoModelForImageClassification``, built small.
    """
    with LIST.open(newline="") as f:
        return [Entry(row["family"], row["name"], int(row["size"])) for row in csv.DictReader(f)]


def build(entry: Entry) -> nn.Module:
    """The model in eval mode, with weights from a fixed seed, without gradients and without any download."""
    torch.manual_seed(0)
    model = _BUILD[entry.family](entry.name, entry.size).eval().requires_grad_(False)
    _shake(model)
    return model


def prepare(family: str) -> None:
    """Import what a family needs.

    Truncated normal distributions become normal ones: drawing them takes most of the time of a large transformer.

    Raises:
        ImportError: it is not installed.
    """
    importlib.import_module({"robustbench": "timm"}.get(family, family))
    if family == "robustbench":
        _robustbench()
    nn.init.trunc_normal_ = _normal  # type: ignore[assignment]
    if "timm.layers.weight_init" in sys.modules:
        sys.modules["timm.layers.weight_init"]._trunc_normal_ = _normal  # type: ignore[attr-defined]


def _normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return tensor.normal_(mean, std)


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Replace what is constant at the start, so that no zero takes a branch, or the head, out of the network.

    Vectors of ones become uniform in [0.8, 1.2], zeros and tiny layer scales normal with deviation 0.1; matrices and
    kernels of zeros normal with deviation 0.02.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        vector = parameter.numel() == max(parameter.shape, default=1)
        if not parameter.is_floating_point():
            continue
        if not vector and not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        if not vector or parameter.numel() < 2 or parameter.unique().numel() > 1:
            continue
        if parameter.flatten()[0].abs() > 0.05:
            parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
        else:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _torchvision(name: str, size: int) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = size
    elif name == "maxvit_t":
        options["input_size"] = (size, size)
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs, from a truncated normal distribution, takes minutes
    return models.get_model(name, weights=None, **options)


def _timm(name: str, size: int) -> nn.Module:
    timm = importlib.import_module("timm")
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # it takes images of any size
        return timm.create_model(name)


def _robustbench() -> Any:
    """RobustBench's definitions; what it needs for evaluation alone may be missing."""
    for missing in ("autoattack", "autoattack.state"):
        try:
            importlib.import_module(missing)
        except ImportError:
            stand_in: Any = types.ModuleType(missing)
            stand_in.AutoAttack = stand_in.EvaluationState = None
            sys.modules[missing] = stand_in
    return importlib.import_module("robustbench.model_zoo.cifar10")


#: RobustBench 1.1.1 asks timm for these by names under which nothing is registered.
_REGISTERED = {
    f"debenedetti2020light_xcit_{k}_cifar10_linf": f"debenedetti2022light_xcit_{k}12_cifar10_linf" for k in "sml"
}


def _robustbench_model(name: str, size: int) -> nn.Module:
    definitions = {str(k.value): v for k, v in _robustbench().cifar_10_models.items()}
    threat, _, key = name.partition("/")
    timm = importlib.import_module("timm")
    create = timm.create_model
    timm.create_model = lambda name, **options: create(_REGISTERED.get(name, name), **{**options, "pretrained": False})
    try:
        return definitions[threat][key]["model"]()
    finally:
        timm.create_model = create


_STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8,
}  # fmt: skip
_SWIN: dict[str, Any] = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
#: Without ``architectures``, transformers 5.24 cannot choose between the two classifiers of DeiT and of LeViT.
_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "vit": _TRANSFORMER,
    "deit": _TRANSFORMER | {"architectures": ["DeiTForImageClassification"]},
    "beit": _TRANSFORMER | {"out_indices": [1, 2], "use_relative_position_bias": True},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "resnet": {"embedding_size": 16, "layer_type": "bottleneck", **_STAGES},
    "regnet": {"embedding_size": 16, "groups_width": 16, **_STAGES},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 16, 24, 32, 48, 48, 96],
        "num_attention_heads": 2,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "num_hidden_layers": 16},
    "poolformer": _STAGES,
    "levit": {
        "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
        "architectures": ["LevitForImageClassification"],
    },
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "pvt": {"num_attention_heads": [1, 2, 3, 4], **_STAGES},
    "dinov2": _TRANSFORMER,
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "num_groups": 8},
}  # fmt: skip


def _transformers(name: str, size: int) -> nn.Module:
    library = importlib.import_module("transformers")
    config = library.AutoConfig.for_model(name, num_labels=10, image_size=size, **_CONFIGURATIONS[name])
    return library.AutoModelForImageClassification.from_config(config)


_BUILD: dict[str, Callable[[str, int], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "robustbench": _robustbench_model,
    "transformers": _transformers,
}
FAMILIES = tuple(_BUILD)


def logits(output: Any) -> Tensor:
    """The tensor that a model's output holds: itself, its ``logits``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else logits(output[0])
