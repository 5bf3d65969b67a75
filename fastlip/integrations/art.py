"""PGD as an ART evasion attack: on PyTorch estimators, and on any other through NumPy.

    from fastlip.integrations.art import FastlipPGD
    adversarial = FastlipPGD(classifier, norm=np.inf, eps=8 / 255, eps_step=2 / 255, max_iter=20).generate(x, y)

On an ``art.estimators.classification.PyTorchClassifier`` whose preprocessing does nothing to gradients this is
:func:`fastlip.attacks.pgd` on the estimator's model. Any other classifier with loss gradients (TensorFlow, JAX,
scikit-learn; preprocessing) is attacked with the fused steps of ``fastlip._native`` on NumPy arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastlip.integrations._names import named
from fastlip.integrations._require import require

_PACKAGE = "adversarial-robustness-toolbox"
_Base: Any = require("art.attacks", _PACKAGE).EvasionAttack
_NORMS = {"inf": "linf", "2": "l2", "2.0": "l2", "1": "l1", "1.0": "l1"}
#: ART's names for fastlip's arguments.
_NAMES = {
    "inputs": "x", "labels": "y", "targets": "y", "step_size": "eps_step", "steps": "max_iter",
    "bounds": "clip_values",
}  # fmt: skip


def _requirements() -> tuple[Any, ...]:
    estimators = require("art.estimators", _PACKAGE)
    classification = require("art.estimators.classification.classifier", _PACKAGE)
    return (estimators.BaseEstimator, estimators.LossGradientsMixin, classification.ClassifierMixin)


class FastlipPGD(_Base):
    """Like art.attacks.evasion.ProjectedGradientDescent, with exact projections in every norm.

    Args:
        estimator: classifier with loss gradients.
        norm: np.inf, 2 or 1.
        eps: radius of the ball, one number or one for each sample, [B].
        eps_step: length of a step, like ``eps``.
        max_iter: number of steps.
        targeted: whether ``y`` are classes to reach.
        num_random_init: number of random starts; 0 starts at the input.
        batch_size: number of samples in a batch.
        sparsity: share of elements that an L1 step leaves alone.
        verbose: has no effect, since nothing is printed.
        seed: seed of the random starts; drawn from NumPy's global state if None.
        options: further keywords of :func:`fastlip.attacks.pgd`, for PyTorch estimators.
    """

    # A list on the class, because ART reads and extends it there.
    attack_params: list[str] = [  # noqa: RUF012
        *getattr(_Base, "attack_params", []),
        *("norm", "eps", "eps_step", "max_iter", "targeted", "num_random_init", "batch_size", "sparsity", "verbose"),
    ]
    _estimator_requirements = _requirements()

    def __init__(
        self,
        estimator: Any,
        norm: float | str = np.inf,
        eps: float | np.ndarray = 0.3,
        eps_step: float | np.ndarray = 0.1,
        max_iter: int = 100,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        sparsity: float = 0.99,
        verbose: bool = False,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(estimator=estimator)
        if str(norm) not in _NORMS:
            raise ValueError(f"norm must be np.inf, 2 or 1, got {norm!r}")
        self.norm = norm
        self.eps, self.eps_step = eps, eps_step
        self.max_iter = max_iter
        self._targeted = targeted
        self.num_random_init = num_random_init
        self.batch_size = batch_size
        self.sparsity = sparsity
        self.verbose = verbose
        self.seed = seed
        self.options = options

    def generate(
        self,
        x: np.ndarray,  # [B, ...]
        y: np.ndarray | None = None,  # [B] or [B, C]
        **kwargs: Any,
    ) -> np.ndarray:
        """Return adversarial samples, [B, ...]; with ``y`` None the classifier's own decisions are the labels.

        A sample that is misclassified (if targeted: classified as its target) to begin with comes back unchanged,
        except with ``keep="last"``.

        Integer samples come back as float32, which is ART's own type; a PyTorch model gets samples of its own dtype.

        Raises:
            ValueError: a value is wrong, or another keyword asks for something else, such as ``mask``.
        """
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"generate takes x and y alone, got {', '.join(unknown)}")
        x = np.asarray(x) if np.asarray(x).dtype.kind == "f" else np.asarray(x, dtype=np.float32)
        if y is None:
            if self.targeted:
                raise ValueError("y must hold the classes to reach, because the attack is targeted")
            y = self.estimator.predict(x, batch_size=self.batch_size)
        classes = np.argmax(y, 1) if np.ndim(y) == 2 and np.shape(y)[1] > 1 else np.reshape(y, -1)
        classes = classes.astype(np.int64)
        low, high = self.estimator.clip_values if self.estimator.clip_values is not None else (-np.inf, np.inf)
        # ART draws from NumPy's global state, so that a script which seeds it is repeatable.
        seed = int(np.random.randint(2**31)) if self.seed is None else self.seed  # noqa: NPY002
        run: Callable[..., np.ndarray] = self._torch if _plain_torch(self.estimator) else self._numpy
        out = np.empty_like(x)
        for first in range(0, len(x), self.batch_size):
            rows = slice(first, min(first + self.batch_size, len(x)))
            eps, step = (v[rows] if isinstance(v, np.ndarray) else float(v) for v in (self.eps, self.eps_step))
            bounds = tuple(v if np.ndim(v) == 0 else np.asarray(v) for v in (low, high))
            out[rows] = run(x[rows], classes[rows], np.arange(rows.start, rows.stop), eps, step, bounds, seed)
        return out

    def _torch(
        self, x: np.ndarray, classes: np.ndarray, ids: np.ndarray, eps: Any, step: Any, bounds: Any, seed: int
    ) -> np.ndarray:
        import torch

        from fastlip import attacks

        device = self.estimator.device

        def there(value: Any) -> Any:
            return torch.from_numpy(value.copy()).to(device) if isinstance(value, np.ndarray) else value

        labels = there(classes)
        call: dict[str, Any] = {
            "norm": _NORMS[str(self.norm)],
            "eps": there(eps),
            "step_size": there(step),
            "steps": self.max_iter,
            "loss": "ce",
            "random_start": self.num_random_init > 0,
            "restarts": max(self.num_random_init, 1),
            "bounds": tuple(there(b) if isinstance(b, np.ndarray) else float(b) for b in bounds),
            "sparsity": self.sparsity,
            "targets": labels if self.targeted else None,
            "ids": there(ids),
            "generator": torch.Generator(device).manual_seed(seed),
        }
        model = self.estimator.model
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        with named({ours: theirs for ours, theirs in _NAMES.items() if ours not in self.options}):
            return attacks.pgd(model, there(x).to(dtype), labels, **call | self.options).cpu().numpy()

    def _numpy(
        self, x: np.ndarray, classes: np.ndarray, ids: np.ndarray, eps: Any, step: Any, bounds: Any, seed: int
    ) -> np.ndarray:
        from fastlip import _native

        norm = _NORMS[str(self.norm)]
        sign = -1.0 if self.targeted else 1.0
        start = np.ascontiguousarray(x)
        best = start.copy()
        robust = np.arange(len(x))
        if self.options.get("keep") != "last":
            robust = robust[~self._succeeded(x, classes)]
        for restart in range(max(self.num_random_init, 1)):
            if len(robust) == 0:
                break
            rows = robust
            x0 = start[rows]
            radius, length = (v[rows] if isinstance(v, np.ndarray) else v for v in (eps, step))
            limits = tuple(b[rows] if np.ndim(b) == x.ndim and len(b) == len(start) > 1 else b for b in bounds)
            ball = {"eps": radius, "norm": norm, "bounds": limits}
            moved = x0.copy()
            if self.num_random_init:
                moved = _native.random_start(x0, **ball, ids=ids[rows].astype(np.int64), key=seed + restart)
            labels = np.eye(self.estimator.nb_classes, dtype=np.float32)[classes[rows]]
            for _ in range(self.max_iter):
                grad = np.ascontiguousarray(self.estimator.loss_gradient(moved, labels), dtype=moved.dtype)
                _native.pgd_step_(moved, sign * grad, x0, step_size=length, sparsity=self.sparsity, active=None, **ball)
            best[rows] = moved
            robust = rows[~self._succeeded(moved, classes[rows])]
        return best

    def _succeeded(self, x: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Whether the attack has succeeded at ``x``, [B] bool."""
        decided = np.argmax(self.estimator.predict(x, batch_size=self.batch_size), 1)
        found: np.ndarray = (decided == classes) if self.targeted else (decided != classes)
        return found


def _plain_torch(estimator: Any) -> bool:
    """Whether the estimator hands its samples to the model unchanged."""
    classifier = require("art.estimators.classification", _PACKAGE).PyTorchClassifier
    if not isinstance(estimator, classifier) or estimator.preprocessing_defences or estimator.postprocessing_defences:
        return False
    given = estimator.preprocessing
    if given is None:
        return True
    mean, std = getattr(given, "mean", None), getattr(given, "std", None)
    return mean is not None and std is not None and bool(np.all(mean == 0) and np.all(std == 1))
