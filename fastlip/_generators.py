"""The source of random numbers of those who name none."""

import secrets

import torch


def unpredictable_generator() -> torch.Generator:
    """A generator on the CPU that the operating system seeds.

    What holds with a stated probability needs random numbers that have nothing to do with the network, whose weights
    may be the first numbers of PyTorch's own generator.
    """
    return torch.Generator().manual_seed(_entropy())


def _entropy() -> int:
    return secrets.randbits(53)
