"""Weights that were trained elsewhere: published ones, and those in files; all but the head is loaded."""

import difflib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlip._downloads import patience
from fastlip._text import printable
from fastlip.models._architectures import Spec, bare_network, parse, torchvision_names
from fastlip.models._extra import timm, torchvision_models


def load_backbone(model: nn.Sequential, state_dict: Mapping[str, Tensor], head: str = "") -> None:
    """Load everything but the head into a model of :func:`build_model`, in place.

    Args:
        model: the model to load into; its normalisation and its head stay as they are.
        state_dict: weights under the network's own names, bare or behind one common prefix such as ``network.``,
            ``module.`` or ``_orig_mod.``; counts of BatchNorm's batches may be missing. The names in Melas-Kyriazi's
            EfficientNet-PyTorch (``_conv_stem``, ``_blocks.0``) are translated into timm's.
        head: name of the head; the last linear layer or 1x1 convolution by default.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ (another architecture or stem).

    Example:
        >>> import fastlip
        >>> model = fastlip.models.build_model("fastlip:mlp", 10, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> source = fastlip.models.build_model("fastlip:mlp", 100, image_size=8, mean=[0.5] * 3, std=[0.25] * 3)
        >>> fastlip.models.load_backbone(model, source.state_dict())  # all but the head
    """
    network = model.get_submodule("network")
    apart = (head or _last_layer(network)).removeprefix("network.")
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith(f"{apart}.")}
    state_dict = _in_timms_names(state_dict, network)
    if not wanted:
        raise ValueError("the model has no weights but those of its head")
    prefix = _prefix(state_dict, wanted)
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    given = {k: v for k, v in given.items() if not k.startswith(f"{apart}.")}
    for key, value in wanted.items():
        if key not in given and not key.endswith("num_batches_tracked"):
            raise ValueError(f"state_dict has no {printable(prefix)}{key}: it comes from another architecture")
        if key in given and given[key].shape != value.shape:
            raise ValueError(
                f"state_dict has {printable(prefix)}{key} of shape {list(given[key].shape)} where the model has "
                f"{list(value.shape)}: it comes from another architecture, stem or image size"
            )
        if key in given and value.is_floating_point() and not given[key].is_floating_point():
            raise ValueError(
                f"state_dict has {printable(prefix)}{key} in {given[key].dtype} where the model has {value.dtype}"
            )
    surplus = sorted(given.keys() - wanted.keys())
    if surplus:
        raise ValueError(
            f"state_dict has {printable(prefix + surplus[0])}, which the model has not: another architecture"
        )
    network.load_state_dict(given, strict=False)


def imagenet_weights(
    timeout: float = 10.0,
    *,
    model: str = "torchvision:resnet50",
    weights: str = "",
    image_size: int = 224,
) -> dict[str, Tensor]:
    """Published ImageNet weights of a model, from the cache of torch.hub or of Hugging Face, or the network.

    Args:
        timeout: seconds without an answer after which a download is given up.
        model: "torchvision:NAME" or "timm:NAME".
        weights: which of them: for torchvision such as "IMAGENET1K_V1", for timm a tag such as "a1_in1k"; the
            library's default if empty.
        image_size: height and width of the images that reach the network, to which timm fits position embeddings.

    Returns:
        The state dict under the library's names, on the CPU, with the head for ImageNet's classes.

    Raises:
        ValueError: there are no such weights.
        OSError: they are not in the cache and cannot be downloaded.
        ImportError: the library is missing.

    Example:
        >>> import fastlip
        >>> name, cached = fastlip.models.published_weights("torchvision:resnet18")
        >>> if cached:  # otherwise they would be fetched here
        ...     weights = fastlip.models.imagenet_weights(model="torchvision:resnet18")
    """
    found, spec = _published(model, weights)
    size = (3, image_size, image_size)
    classes = found.num_classes if spec.family == "timm" else len(found.meta["categories"])
    try:
        with patience(timeout):
            # torchvision checks the hash: a download cut short must not become a cache entry.
            return dict(bare_network(spec, classes, size, found).state_dict())
    except (ImportError, ValueError):
        raise
    except Exception as error:  # each library's own kinds for what its servers and caches lack
        reason = printable(" ".join(str(error).split()))[:300]
        raise OSError(f"ImageNet weights of {spec} are neither cached nor to be had: {reason}") from None


def published_weights(model: str, weights: str = "") -> tuple[str, bool]:
    """The name of published ImageNet weights, and whether they are in the cache; arguments as for the weights.

    Raises:
        ValueError: there are no such weights; the message gives the closest.
        ImportError: the library is missing.

    Example:
        >>> import fastlip
        >>> name, cached = fastlip.models.published_weights("torchvision:resnet18")
    """
    found, spec = _published(model, weights)
    if spec.family == "torchvision":
        file = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rpartition("/")[2]
        return str(found), file.exists()
    hub = importlib.import_module("huggingface_hub")
    files = ("model.safetensors", "pytorch_model.bin")
    cached = any(isinstance(hub.try_to_load_from_cache(found.hf_hub_id, f), str) for f in files if found.hf_hub_id)
    return str(spec), cached


def _published(model: str, weights: str) -> tuple[Any, Spec]:
    """A member of torchvision's enumeration of weights, or timm's configuration of them; and the model with its tag."""
    spec = parse(model)
    if spec.family == "torchvision":
        return _torchvision_weights(spec.name, weights), spec
    if spec.family != "timm":
        raise ValueError(f"there are published weights of torchvision:NAME and timm:NAME, not of {printable(model)}")
    tagged = _timm_weights(spec.name, weights)
    return timm().get_pretrained_cfg(tagged), Spec("timm", tagged)


def _torchvision_weights(name: str, weights: str) -> Any:
    """A member of torchvision's enumeration of the weights of the model ``name``; the default if ``weights`` is empty.

    Raises:
        ValueError: there are none of that name; the message gives the closest.
    """
    models = torchvision_models()
    if name not in torchvision_names():
        bare_network(Spec("torchvision", name), 2, (3, 224, 224))  # says so, with the closest names
    known = models.get_model_weights(name)
    if weights and weights not in known.__members__:
        raise ValueError(
            f"torchvision:{name} has the weights {', '.join(known.__members__)}, not {printable(weights)!r}"
        )
    if not len(known):
        raise ValueError(f"torchvision has no weights of {name}")
    return known[weights or "DEFAULT"]


def _timm_weights(model: str, weights: str) -> str:
    """Timm's name of a model with the tag of its weights, as in "resnet50.a1_in1k"."""
    library = timm()
    if not library.is_model(model):
        bare_network(Spec("timm", model), 2, (3, 224, 224))  # says so, with the closest names
    name, _, tag = model.partition(".")
    known = [full.partition(".")[2] for full in library.list_pretrained(f"{name}.*")]
    if not known:
        raise ValueError(f"timm has no weights of {name}")
    tag = weights or tag
    if tag and tag not in known:
        close = difflib.get_close_matches(tag, known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(f"timm has no weights {printable(tag)!r} of {name}; the closest are {', '.join(close)}")
    return f"{name}.{tag}" if tag else name


def _prefix(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The prefix behind which a state dict has most of the ``wanted`` names.

    Raises:
        ValueError: it has none of them.
    """
    candidates = {""}
    for name in wanted:
        candidates |= {key.removesuffix(name) for key in state_dict if key.endswith(f".{name}")}
        if len(candidates) > 1 or name in state_dict:
            break
    best = max(sorted(candidates), key=lambda prefix: sum(prefix + name in state_dict for name in wanted))
    if not any(best + name in state_dict for name in wanted):
        first = next(iter(wanted))
        raise ValueError(f"state_dict has no key {first}: it holds no weights of this architecture under its own names")
    return best


def _last_layer(network: nn.Module) -> str:
    """Name of the last linear layer or 1x1 convolution among a network's modules."""
    found = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1})
    ]
    if not found:
        raise ValueError("the model has no linear layer or 1x1 convolution as its head; name the head")
    return found[-1]


def _in_timms_names(state_dict: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """The weights of an EfficientNet from the port that calls its first layer ``_conv_stem``, in timm's names."""
    first = next((key for key in state_dict if key.endswith("_conv_stem.weight")), None)
    own = network.state_dict()
    if first is None or "conv_stem.weight" not in own:
        return state_dict
    prefix = first.removesuffix("_conv_stem.weight")
    blocks = list(dict.fromkeys(m[0] for key in own if (m := re.match(r"blocks\.\d+\.\d+", key))))
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    found: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name, rest = key.removeprefix(prefix), ""
        match = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
        if match is None:
            layer, _, rest = name.partition(".")
            found[f"{outside.get(layer, layer)}.{rest}"] = value
            continue
        at, layer, rest = int(match[1]), match[2], match[3]
        if at >= len(blocks):
            raise ValueError(f"state_dict has {printable(key)} where the model has {len(blocks)} blocks")
        expands = f"{prefix}_blocks.{at}._expand_conv.weight" in state_dict
        inside = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn2" if expands else "bn1",
            "_project_conv": "conv_pwl" if expands else "conv_pw",
            "_bn2": "bn3" if expands else "bn2",
            "_se_reduce": "se.conv_reduce",
            "_se_expand": "se.conv_expand",
        }
        found[f"{blocks[at]}.{inside.get(layer, layer)}.{rest}"] = value
    return found
