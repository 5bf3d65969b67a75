"""What else is measured: test images, norms, features, corruptions, smoothing."""

from dataclasses import dataclass

#: Corruptions that the study generates itself (:mod:`fastlip.study.measure.corruptions`).
GENERATED_CORRUPTIONS = (
    "gaussian_noise",
    "gaussian_blur",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
    "jpeg_compression",
)


@dataclass(frozen=True)
class EvaluationSettings:
    """The test images that everything is measured on.

    Attributes:
        images: attacked test images, the same number of each class, fixed by their order in the test set.
        clean_images: test images for clean accuracy alone; the attacked ones are the first of them.
        snapshot_images: attacked images that the snapshots of training are measured on, the first of them.
        batch_size: images per forward pass.
    """

    images: int
    clean_images: int
    snapshot_images: int = 48
    batch_size: int = 100


@dataclass(frozen=True)
class LipschitzSettings:
    """Certified norms and Jacobian norms.

    Attributes:
        eta: probability, over all random starts of the run, that any stated upper bound fails.
        jacobian_images: images at which the norm of the Jacobian is computed.
        jacobian_steps: most steps of its power iteration.
    """

    eta: float = 1e-6
    jacobian_images: int = 16
    jacobian_steps: int = 15


@dataclass(frozen=True)
class FeatureSettings:
    """Spectra of feature maps, and the growth of perturbations with depth.

    Attributes:
        images: images whose features are taken, clean, under PGD at ``rules.compared_linf_255`` and under Gaussian
            noise of the same norm.
    """

    images: int = 96


@dataclass(frozen=True)
class CorruptionSettings:
    """Common corruptions.

    Attributes:
        severities: from 1 to 5.
        images: images corrupted, the first of the attacked ones.
    """

    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int = 96


@dataclass(frozen=True)
class SmoothingSettings:
    """Randomised smoothing (Cohen et al. 2019): certificates for the model's decision under Gaussian noise.

    Attributes:
        images: images certified, the first of the attacked ones.
        sigma: standard deviation of the noise, pixels in [0, 1].
        selection: draws that choose the class.
        samples: draws that certify it.
        alpha: probability that one image's certificate is wrong.
    """

    images: int = 20
    sigma: float = 0.1
    selection: int = 16
    samples: int = 128
    alpha: float = 0.001
