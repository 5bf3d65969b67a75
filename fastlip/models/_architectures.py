"""Networks by name, behind their normalisation, on native images in [0, 1]."""

import difflib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlip._text import printable
from fastlip.models._extra import timm, torchvision_models
from fastlip.models._normalize import Normalize
from fastlip.models._quiet import undisturbed
from fastlip.models._references import REFERENCES
from fastlip.models._stems import STEMS, change_stem
from fastlip.models._torch_modules import expand_timm_layers

#: Channel statistics of ImageNet, the inputs that torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Factors by which images may be enlarged inside a model.
SCALES = (1, 2, 4, 7)

_FORMS = "torchvision:NAME, timm:NAME, fastlip:NAME or package.module:function"


class Spec(NamedTuple):
    """A network by name: the family "torchvision", "timm" or "fastlip", or a module; and a name in it."""

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family}:{self.name}"


def build_model(
    spec: str,
    num_classes: int,
    *,
    image_size: int | tuple[int, int] = 32,
    stem: str = "imagenet",
    scale: int = 1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int | None = None,
) -> nn.Sequential:
    """A network with random weights, in float32: ``Sequential(normalize, [enlarge], network)``.

    Args:
        spec: "torchvision:NAME", "timm:NAME", "fastlip:NAME" (:data:`REFERENCES`), or "package.module:function", which
            is called with ``num_classes=`` and returns a network that takes normalised images.
        num_classes: number of logits.
        image_size: height and width of the images that the model takes; ``network`` gets ``scale`` times as large ones.
        stem: one of :data:`STEMS`.
        scale: one of :data:`SCALES`, a factor by which images are enlarged (bilinear) in front of ``network``.
        mean: channel means that are subtracted; by default those that timm's weights expect, or ImageNet's.
        std: channel standard deviations that are divided by, likewise.
        seed: of the initialisation, which then leaves the global random state alone; drawn from it if None.

    Returns:
        A model from images [B, C, H, W] in [0, 1] to logits [B, num_classes], in training mode. The last BatchNorm of
        each block of torchvision's ResNets starts at zero, so that training begins with short paths (Goyal et al.
        2017). timm's BatchNorms with activation, and its padding by input size, are replaced by torch's modules.

    Raises:
        ValueError: a value is out of range, there is no such network, the stem or the image size does not fit it, or
            its output is not [B, num_classes]; one line that says what was expected.
        ImportError: torchvision, timm or the module is missing.

    Example:
        >>> import torch
        >>> import fastlip
        >>> model = fastlip.models.build_model("fastlip:mlp", 10, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> print(model(torch.rand(2, 3, 8, 8)).shape)
    """
    parsed = parse(spec)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if stem not in STEMS:
        raise ValueError(f"stem must be {_one_of(STEMS)}, got {stem!r}{_closest(stem, STEMS)}")
    if scale not in SCALES:
        raise ValueError(f"scale must be {_one_of(map(str, SCALES))}, got {scale!r}")
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"image_size must be one or two positive numbers, got {image_size!r}")
    channels = 3 if mean is None else len(mean)
    native = (channels, size[0], size[1])
    shape = (channels, scale * size[0], scale * size[1])
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        network = bare_network(parsed, num_classes, shape)
        if stem != "imagenet":
            _require_runs(network, parsed, num_classes, shape)
            change_stem(network, stem, shape, spec)
    if parsed.family == "timm":
        _require_runs(network, parsed, num_classes, shape)
        expand_timm_layers(network, shape)
    expected = _expected_statistics(network)
    normalize = Normalize(expected[0] if mean is None else mean, expected[1] if std is None else std)
    layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=normalize)
    if scale != 1:
        layers["enlarge"] = nn.Upsample(scale_factor=scale, mode="bilinear")
    layers["network"] = network
    model = nn.Sequential(layers).float()
    _require_runs(model, parsed, num_classes, native)
    return model


def parse(spec: str) -> Spec:
    """``spec`` in its two parts; raises ValueError where it is of no known form."""
    family, colon, name = spec.partition(":")
    if not colon or not family or not name:
        known = [f"torchvision:{spec}"] if spec.isidentifier() else []
        hint = f"; did you mean {known[0]}?" if known else ""
        raise ValueError(f"a model is named by {_FORMS}, got {printable(spec)!r}{hint}")
    return Spec(family, name)


def bare_network(
    spec: Spec, num_classes: int, shape: tuple[int, int, int], weights: Any = None, **options: Any
) -> nn.Module:
    """The network without its normalisation, with random weights or with published ``weights``.

    Args:
        spec: names the network.
        num_classes: number of its outputs.
        shape: [C, H, W] of the images that reach it.
        weights: a member of torchvision's enumeration of weights; True for timm's; None for random weights.
        options: passed on to timm.
    """
    if spec.family == "torchvision":
        return _torchvision(spec.name, num_classes, shape, weights)
    if spec.family == "timm":
        return _timm(spec.name, num_classes, shape, bool(weights), options)
    if spec.family == "fastlip":
        if spec.name not in REFERENCES:
            raise ValueError(f"fastlip:{printable(spec.name)}: choose {_one_of(REFERENCES)}")
        return REFERENCES[spec.name](num_classes, shape)
    return _function(spec, num_classes)


def torchvision_names() -> list[str]:
    """Names of torchvision's networks for classification."""
    models = torchvision_models()
    names: list[str] = models.list_models(module=models)
    return names


def _torchvision(name: str, num_classes: int, shape: tuple[int, int, int], weights: Any) -> nn.Module:
    models, known = torchvision_models(), torchvision_names()
    if name not in known:
        raise ValueError(f"torchvision has no classification model {printable(name)!r}{_closest(name, known)}")
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        if shape[1] != shape[2]:
            raise ValueError(f"torchvision:{name} takes square images, got {shape[1]} x {shape[2]}")
        options["image_size"] = shape[1]
    network: nn.Module = models.get_model(name, weights=weights, num_classes=num_classes, **options)
    if weights is None:
        for module in network.modules():
            last = {"Bottleneck": "bn3", "BasicBlock": "bn2"}.get(type(module).__name__)
            if isinstance(network, models.ResNet) and last is not None:
                nn.init.zeros_(module.get_submodule(last).get_parameter("weight"))
    return network


def _timm(
    name: str, num_classes: int, shape: tuple[int, int, int], pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    library = timm()
    if not library.is_model(name):
        known = library.list_models()
        raise ValueError(f"timm has no model {printable(name)!r}{_closest(name.partition('.')[0], known)}")
    config = library.get_pretrained_cfg(name)
    options = dict(options)
    if config is not None and config.fixed_input_size:
        options["img_size"] = shape[1:]
    network: nn.Module = library.create_model(name, pretrained, num_classes=num_classes, in_chans=shape[0], **options)
    return network


def _function(spec: Spec, num_classes: int) -> nn.Module:
    try:
        module = importlib.import_module(spec.family)
    except ImportError as error:
        if error.name is None or not f"{spec.family}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something
        known = ["torchvision", "timm", "fastlip"]
        raise ImportError(
            f"{printable(str(spec))}: there is no module {printable(error.name)}{_closest(spec.family, known)}; "
            f"a model is named by {_FORMS}"
        ) from None
    function = getattr(module, spec.name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value)]
        raise ValueError(f"{spec.family} has no function {printable(spec.name)!r}{_closest(spec.name, known)}")
    try:
        inspect.signature(function).bind(num_classes=num_classes)
    except TypeError as error:
        raise ValueError(f"{spec} is called with num_classes= alone: {error}") from None
    except ValueError:  # some functions of extension modules have no signature
        pass
    network = function(num_classes=num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{spec} must return a torch module, got {type(network).__name__}")
    return network


def _require_runs(network: nn.Module, spec: Spec, num_classes: int, shape: tuple[int, int, int]) -> None:
    """Raise ValueError where the output on images of ``shape``, in either mode, is not [B, num_classes]."""
    parameter = next(network.parameters(), None)
    images = torch.full((2, *shape), 0.5, dtype=torch.float32 if parameter is None else parameter.dtype)
    for training in (False, True):
        mode = "training" if training else "evaluation"
        try:
            with undisturbed(network, training=training), torch.no_grad():
                output = network(images)
        except Exception as error:
            reason = printable(" ".join(str(error).split()))[:200]
            size = " x ".join(map(str, shape))
            raise ValueError(f"{spec} does not run on images of {size} in {mode} mode: {reason}") from None
        if not isinstance(output, Tensor) or output.shape != (2, num_classes):
            got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{spec} must map 2 images to logits of shape [2, {num_classes}], got {got} in {mode} mode"
            )


def _expected_statistics(network: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Means and standard deviations that published weights of a network expect."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)


def _one_of(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}"


def _closest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {_one_of(close) if len(close) > 1 else close[0]}?" if close else ""
