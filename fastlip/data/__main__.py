"""``python -m fastlip.data NAME FOLDER`` writes a data set as a folder of images, one folder for each class."""

import argparse
import sys
from pathlib import Path

import torch

from fastlip.data import cifar10, cifar100, svhn, write_folder

_NAMED = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line.

    Args:
        arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(prog="python -m fastlip.data", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("name", choices=_NAMED)
    parser.add_argument("folder", type=Path, help="where FOLDER/CLASS/NUMBER.png are written")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the published files (data)")
    parser.add_argument("--download", action="store_true", help="fetch them where they are missing")
    parser.add_argument("--test", action="store_true", help="the test images rather than those for training")
    parser.add_argument("--per-class", type=int, metavar="N", help="the first N images of each class; all by default")
    given = parser.parse_args(arguments)
    try:
        images = _NAMED[given.name](given.data, train=not given.test, download=given.download)
        if given.per_class is not None:
            rows = [(images.labels == label).nonzero()[: given.per_class, 0] for label in range(len(images.classes))]
            if given.per_class < 1 or any(len(own) < given.per_class for own in rows):
                raise ValueError(f"--per-class {given.per_class}: a class has {min(map(len, rows))} images")
            images = images.subset(torch.cat(rows))
        write_folder(images, given.folder)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{given.folder}: {len(images)} images of {len(images.classes)} classes")


if __name__ == "__main__":
    main()
