"""What models are called in words."""

from fastlip.study.settings.settings import Settings
from fastlip.study.storage.run_directory import TrainedModel

#: The small references are named by what they are; how they were trained goes without saying.
_REFERENCES = {
    "softmax": "softmax regression",
    "mlp": "two-layer perceptron",
    "convnet": "small ConvNet",
    "resnet18": "ResNet-18",
}

_TRAINING = {
    "scratch": "from scratch",
    "disjoint": "from scratch on disjoint images",
    "matched": "from scratch, compute-matched",
    "constrained": "from scratch, norms ≤ {bound:g}",
    "finetune": "fine-tuned",
    "linear": "linear probe",
    "partial": "last stage fine-tuned",
    "lpft": "probed, then fine-tuned",
}

#: Families of networks as their authors write them, by the beginning of their names in torchvision and timm.
_FAMILIES = {
    "resnet": "ResNet-",
    "wide_resnet": "Wide ResNet-",
    "resnext": "ResNeXt-",
    "densenet": "DenseNet-",
    "vgg": "VGG-",
    "mobilenet": "MobileNet-",
    "efficientnet_lite": "EfficientNet-Lite",
    "efficientnet": "EfficientNet-",
    "convnext": "ConvNeXt-",
    "regnet": "RegNet-",
    "squeezenet": "SqueezeNet-",
    "shufflenet": "ShuffleNet-",
    "alexnet": "AlexNet",
}


def network_title(architecture: str) -> str:
    """The network in words, as in "ResNet-50" for "torchvision:resnet50"; an unknown name stays as it is."""
    name = architecture.rpartition(":")[2]
    own = name.removeprefix("tf_")  # timm's mark for weights that come from TensorFlow
    for family in sorted(_FAMILIES, key=len, reverse=True):
        if own.startswith(family):
            parts = own.removeprefix(family).strip("_").split("_")
            rest = "-".join(part.upper() if len(part) < 3 else part.capitalize() for part in parts)
            return (_FAMILIES[family] + rest).removesuffix("-")
    return name


def model_title(settings: Settings, model: TrainedModel) -> str:
    """The model in words: network, training and, where there are several, the seed; a checkpoint's own name."""
    if settings.role_of(model.arm) == "checkpoint":
        return model.arm
    if model.arm in _REFERENCES:
        words = _REFERENCES[model.arm]
    else:
        training = _TRAINING[model.arm].format(bound=settings.norm_bound(model.arm, model.seed))
        words = f"{network_title(settings.architecture_of(model.arm))}, {training}"
    return f"{words}, seed {model.seed}" if settings.seeds > 1 else words
