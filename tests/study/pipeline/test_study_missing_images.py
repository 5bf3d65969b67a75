"""Folders of images that are not there are named, whether or not they may be fetched."""

import re

import pytest

from fastlip.study.pipeline import image_sets


@pytest.mark.parametrize("download", [False, True])
def test_a_folder_without_the_files_is_named(tmp_path, monkeypatch, download):
    def read(root, train, download=False):
        raise OSError("no route to host\nand more") if download else FileNotFoundError("data_batch_1 is missing")

    monkeypatch.setitem(image_sets._NAMED, "cifar10", image_sets._NAMED["cifar10"]._replace(read=read))
    given = image_sets.GivenImages("cifar10", tmp_path / "absent", 32, ("train", "test"))
    told = f"no CIFAR-10 in {tmp_path / 'absent'}"
    told += ", and it is not to be had (no route to host)" if download else ""
    with pytest.raises(FileNotFoundError, match=re.escape(told) + "$"):
        given.fetch(download)
    assert not (tmp_path / "absent").exists()
