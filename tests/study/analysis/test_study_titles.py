import dataclasses

import pytest

from fastlip.study.analysis.titles import model_title, network_title
from fastlip.study.settings.training import ARMS
from fastlip.study.storage.run_directory import TrainedModel


@pytest.mark.parametrize(
    ("architecture", "title"),
    [
        ("torchvision:resnet50", "ResNet-50"),
        ("torchvision:resnext50_32x4d", "ResNeXt-50-32x4d"),
        ("torchvision:wide_resnet50_2", "Wide ResNet-50-2"),
        ("timm:efficientnet_lite0", "EfficientNet-Lite0"),
        ("timm:tf_efficientnet_lite0", "EfficientNet-Lite0"),
        ("timm:tf_unknown", "tf_unknown"),
        ("torchvision:vgg11_bn", "VGG-11-BN"),
        ("torchvision:alexnet", "AlexNet"),
        ("torchvision:mobilenet_v3_small", "MobileNet-V3-Small"),
        ("package.module:function", "function"),
    ],
)
def test_networks_have_the_names_of_the_papers(architecture, title):
    assert network_title(architecture) == title


def test_titles_name_network_training_and_seed(micro):
    settings = dataclasses.replace(micro, model="torchvision:resnet50", seeds=2)
    assert model_title(settings, TrainedModel("finetune", 1)) == "ResNet-50, fine-tuned, seed 1"
    assert model_title(settings, TrainedModel("softmax", 0)) == "softmax regression, seed 0"
    bounded = dataclasses.replace(settings, norm_bounds=(2.0, 0.25))
    titles = [model_title(bounded, TrainedModel("constrained", seed)) for seed in (0, 1)]
    assert titles == [f"ResNet-50, from scratch, norms ≤ {b}, seed {s}" for s, b in enumerate(("2", "0.25"))]
    one = dataclasses.replace(settings, seeds=1)
    assert model_title(one, TrainedModel("scratch", 0)) == "ResNet-50, from scratch"
    assert model_title(one, TrainedModel("resnet18", 0)) == "ResNet-18"
    assert len({model_title(one, TrainedModel(arm, 0)) for arm in ARMS}) == len(ARMS)


def test_a_checkpoint_is_called_by_its_name(micro):
    settings = dataclasses.replace(micro, arms=(), checkpoints=("tuned",))
    assert model_title(settings, TrainedModel("tuned", 0, given=True)) == "tuned"
    assert TrainedModel("tuned", 0, given=True).name == "tuned"
