"""Labelled images: CIFAR-10 and -100, SVHN, image folders, Hugging Face data sets, CIFAR-10-C, and generated ones."""

from fastlip.data._cifar import cifar10, cifar100
from fastlip.data._cifar_c import cifar10_c
from fastlip.data._folder import folder_listing, image_folder, write_folder
from fastlip.data._generated import Split, Task, generated
from fastlip.data._hugging_face import hugging_face, hugging_face_fingerprint
from fastlip.data._image_set import ImageSet
from fastlip.data._statistics import CHANNEL_STATISTICS
from fastlip.data._svhn import svhn

__all__ = [
    "CHANNEL_STATISTICS",
    "ImageSet",
    "Split",
    "Task",
    "cifar10",
    "cifar10_c",
    "cifar100",
    "folder_listing",
    "generated",
    "hugging_face",
    "hugging_face_fingerprint",
    "image_folder",
    "svhn",
    "write_folder",
]
