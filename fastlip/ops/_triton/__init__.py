"""Triton kernels, one file per operator; ``fastlip.ops.triton_kernels`` names what they offer."""
