"""Settings of the measurements other than attacks: test images, norms, features, corruptions, smoothing."""

from dataclasses import dataclass

#: Corruptions that the study can generate itself (:mod:`fastlip.study.measure.corruptions`).
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
    """The test images: how many are used, and for what.

    Attributes:
        images: number of attacked test images: the first of each class in the order of the test set.
        clean_images: number of test images for clean accuracy; the attacked images are among them.
        snapshot_images: number of attacked images, the first ones, that snapshots are measured on.
        batch_size: images per forward pass.
    """

    images: int
    clean_images: int
    snapshot_images: int = 48
    batch_size: int = 100


@dataclass(frozen=True)
class LipschitzSettings:
    """Certified norms, and norms of Jacobians.

    Attributes:
        eta: probability, over all random starts of the run, that any upper bound is wrong.
        jacobian_images: number of images at which the norm of the Jacobian is computed.
        jacobian_steps: largest number of vectors that ``local_lipschitz`` tries.
    """

    eta: float = 1e-6
    jacobian_images: int = 16
    jacobian_steps: int = 15


@dataclass(frozen=True)
class FeatureSettings:
    """Spectra of feature maps, and the growth of perturbations with depth.

    Attributes:
        images: number of images whose features are taken: clean, under PGD at ``rules.compared_linf_255``, and under
            Gaussian noise of the same norm.
    """

    images: int = 96


@dataclass(frozen=True)
class CorruptionSettings:
    """Common corruptions.

    Attributes:
        severities: numbers from 1 to 5.
        images: number of corrupted images, the first of the attacked ones.
    """

    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    images: int = 96


@dataclass(frozen=True)
class SmoothingSettings:
    """Randomised smoothing (Cohen et al. 2019), which certifies the majority decision under Gaussian noise.

    Attributes:
        images: number of certified images, the first of the attacked ones.
        sigma: standard deviation of the noise, pixels in [0, 1].
        selection: number of draws that choose the class.
        samples: number of further draws that certify it.
        alpha: probability that the certificate of an image is wrong.
    """

    images: int = 20
    sigma: float = 0.1
    selection: int = 16
    samples: int = 128
    alpha: float = 0.001


@dataclass(frozen=True)
class TransferSettings:
    """Transfer of adversarial examples between the models of a run (Szegedy et al. 2013, section 4.2).

    Attributes:
        images: number of images, the first of the attacked ones.
        l2: L2 norms that every perturbation is scaled to, pixels in [0, 1].
    """

    images: int = 100
    l2: tuple[float, ...] = (0.5, 1.0)
