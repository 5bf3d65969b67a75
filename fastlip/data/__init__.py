"""Labelled 32x32 images: CIFAR-10 and CIFAR-10-C, any image folder, and generated ones for machines without data."""

from fastlip.data._cifar import cifar10
from fastlip.data._cifar_c import cifar10_c
from fastlip.data._folder import image_folder
from fastlip.data._generated import Split, Task, generated
from fastlip.data._image_set import ImageSet

__all__ = ["ImageSet", "Split", "Task", "cifar10", "cifar10_c", "generated", "image_folder"]
