"""PGD as an ART evasion attack: on PyTorch estimators, and on any other through NumPy.

    from fastlip.integrations.art import FastlipPGD
    adversarial = FastlipPGD(classifier, norm=np.inf, eps=8 / 255, eps_step=2 / 255, max_iter=20).generate(x, y)

On an ``art.estimators.classification.PyTorchClassifier`` that hands its samples to the model unchanged and whose loss
is the cross-entropy this is :func:`fastlip.attacks.pgd` on the estimator's model. Any other classifier with loss
gradients (TensorFlow, JAX, scikit-learn; preprocessing; another loss; a subclass of PyTorchClassifier, which may do
anything to its samples) is attacked through its own ``loss_gradient``, with the fused steps of ``fastlip._native`` on
NumPy arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fastlip._arguments import integer
from fastlip.integrations._names import named
from fastlip.integrations._require import require
from fastlip.integrations._settings import keywords_of

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
        eps: radius of the ball, one number or one for each sample, [B]. With ``norm=np.inf`` also one for each feature,
            an array of two axes or more that broadcasts to the samples.
        eps_step: length of a step, like ``eps``. Of one for each feature the largest is taken for all of a sample's
            features, which only their own radii hold back.
        max_iter: number of steps.
        targeted: whether ``y`` are classes to reach.
        num_random_init: number of random starts; 0 starts at the input.
        batch_size: number of samples in a batch.
        sparsity: share of elements that an L1 step leaves alone.
        verbose: has no effect, since nothing is printed.
        seed: seed of the random starts; drawn from NumPy's global state if None.
        options: further keywords of :func:`fastlip.attacks.pgd`, for estimators that it attacks; of any other only
            ``keep``. ``loss`` takes the place of the estimator's own.

    Raises:
        TypeError: a type is wrong, or there is no such option.
        ValueError: a value is wrong, or the estimator cannot have an option.
    """

    # A list on the class, because ART reads and extends it there.
    attack_params: list[str] = [  # noqa: RUF012
        *getattr(_Base, "attack_params", []),
        *("norm", "eps", "eps_step", "max_iter", "targeted", "num_random_init", "batch_size", "sparsity", "verbose"),
        "seed",
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
        self._check_params()

    def _check_params(self) -> None:
        """Raise where a parameter is wrong, when the attack is made, when parameters are set and when it runs."""
        super()._check_params()
        if str(self.norm) not in _NORMS:
            raise ValueError(f"norm must be np.inf, 2 or 1, got {self.norm!r}")
        for name in ("eps", "eps_step"):
            value = getattr(self, name)
            if isinstance(value, (bool, str)) or np.asarray(value).dtype.kind not in "fiu":
                raise TypeError(f"{name} must be a number or an array of numbers, got {value!r}")
            if not (np.asarray(value) >= 0).all():
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        for name, least in (("max_iter", 0), ("num_random_init", 0), ("batch_size", 1)):
            integer(getattr(self, name), name, least)
        for name in ("targeted", "verbose"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.seed is not None:
            integer(self.seed, "seed", 0)
        if unknown := [name for name in self.options if name not in _options()]:
            raise TypeError(f"FastlipPGD takes no option {unknown[0]!r}; it has those of fastlip.attacks.pgd")
        if not self._is_pgd_s():
            if useless := [name for name in self.options if name != "keep"]:
                raise ValueError(
                    f"{useless[0]} cannot be had with this estimator, which is attacked by its loss_gradient"
                )
            if self.options.get("keep", "best") not in ("best", "last"):
                raise ValueError(f"keep must be one of best, last, got {self.options['keep']!r}")

    def _is_pgd_s(self) -> bool:
        """Whether the estimator's model can be attacked by :func:`fastlip.attacks.pgd`."""
        return _plain_torch(self.estimator) and ("loss" in self.options or _climbs_cross_entropy(self.estimator))

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
        What lies outside of ``clip_values`` by rounding is clipped.

        Args:
            x: samples, [B, ...], within the estimator's ``clip_values``.
            y: classes, [B], or one-hot, [B, C].
            kwargs: ``mask``, an array that broadcasts to ``x``: features at which it is 0 are left as they are.

        Raises:
            ValueError: a value is wrong, or there is another keyword.
        """
        self._check_params()
        mask = kwargs.pop("mask", None)
        if unknown := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"generate takes x, y and mask alone, got {', '.join(unknown)}")
        x = np.asarray(x) if np.asarray(x).dtype.kind == "f" else np.asarray(x, dtype=np.float32)
        if y is None:
            if self.targeted:
                raise ValueError("y must hold the classes to reach, because the attack is targeted")
            y = self.estimator.predict(x, batch_size=self.batch_size)
        classes = np.argmax(y, 1) if np.ndim(y) == 2 and np.shape(y)[1] > 1 else np.reshape(y, -1)
        classes = classes.astype(np.int64)
        low: Any
        high: Any
        low, high = self.estimator.clip_values if self.estimator.clip_values is not None else (-np.inf, np.inf)
        x = _inside(x, low, high)
        eps, eps_step = self.eps, self.eps_step
        boxed = mask is not None or np.ndim(eps) > 1
        if boxed:
            low, high = self._box(x, eps, mask, low, high)
        eps, eps_step = _largest(eps, x), _largest(eps_step, x)
        # ART draws from NumPy's global state, so that a script which seeds it is repeatable.
        seed = int(np.random.randint(2**31)) if self.seed is None else self.seed  # noqa: NPY002
        run: Callable[..., np.ndarray] = self._torch if self._is_pgd_s() else self._numpy
        out = np.empty_like(x)
        for first in range(0, len(x), self.batch_size):
            rows = slice(first, min(first + self.batch_size, len(x)))
            radius, step = (_of_rows(v, rows) for v in (eps, eps_step))
            limits = (low[rows], high[rows]) if boxed else (low, high)
            bounds = tuple(v if np.ndim(v) == 0 else np.asarray(v) for v in limits)
            out[rows] = run(x[rows], classes[rows], np.arange(rows.start, rows.stop), radius, step, bounds, seed)
        return out

    def _box(self, x: np.ndarray, eps: Any, mask: Any, low: Any, high: Any) -> tuple[np.ndarray, np.ndarray]:
        """The part of the box that mask and radii of features leave to each sample."""
        radii = np.full(x.shape, np.inf)
        if np.ndim(eps) > 1:
            if _NORMS[str(self.norm)] != "linf":
                raise ValueError("eps must be one number or one for each sample where norm is not np.inf")
            radii = np.array(_broadcast(eps, x, "eps"), np.float64)
        if mask is not None:
            radii[_broadcast(mask, x, "mask") == 0] = 0.0
        exact = x.astype(np.float64)
        limits = []
        for far in (exact - radii, exact + radii):
            near = far.astype(x.dtype)
            # One number back where rounding went beyond the radius.
            near = np.where(np.abs(near - exact) > radii, np.nextafter(near, x), near)
            limits.append(near)
        return np.maximum(limits[0], low).astype(x.dtype), np.minimum(limits[1], high).astype(x.dtype)

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
    """Whether the estimator hands its samples to the model unchanged; a subclass may do anything to them."""
    classifier = require("art.estimators.classification", _PACKAGE).PyTorchClassifier
    if type(estimator) is not classifier or estimator.preprocessing_defences or estimator.postprocessing_defences:
        return False
    given = estimator.preprocessing
    if given is None:
        return True
    mean, std = getattr(given, "mean", None), getattr(given, "std", None)
    return mean is not None and std is not None and bool(np.all(mean == 0) and np.all(std == 1))


def _climbs_cross_entropy(estimator: Any) -> bool:
    """Whether the estimator's loss is the cross-entropy of each sample as it is."""
    import torch

    loss = estimator.loss
    plain = type(loss) is torch.nn.CrossEntropyLoss and loss.weight is None and loss.label_smoothing == 0
    return plain and loss.ignore_index < 0


def _options() -> list[str]:
    """The keywords of :func:`fastlip.attacks.pgd`."""
    from fastlip import attacks

    return list(keywords_of(attacks.pgd))


def _broadcast(values: Any, x: np.ndarray, name: str) -> np.ndarray:
    try:
        return np.broadcast_to(np.asarray(values), x.shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to x's shape {x.shape}, got {np.shape(values)}") from None


def _largest(value: Any, x: np.ndarray) -> Any:
    """A number, or one for each sample; the largest of those of its features."""
    if np.ndim(value) < 2:
        return value
    return _broadcast(value, x, "eps_step").reshape(len(x), -1).max(1, initial=0)


def _of_rows(value: Any, rows: slice) -> Any:
    """A number, or those of these rows of an array with one for each sample."""
    return np.asarray(value)[rows] if np.ndim(value) else float(value)


def _inside(x: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """``x``, clipped where it leaves the box by rounding; raise where it leaves it by more."""
    clipped: np.ndarray = np.clip(x, low, high)
    limits = [np.abs(np.asarray(limit, np.float64)) for limit in (low, high)]
    largest = np.maximum(*(np.where(np.isfinite(limit), limit, 0) for limit in limits))
    if not (np.abs(x - clipped.astype(np.float64)) <= 2 * np.finfo(x.dtype).eps * largest).all():
        raise ValueError(f"x must lie within clip_values, but holds values from {x.min():g} to {x.max():g}")
    return clipped.astype(x.dtype, copy=False)
