"""The interval that a norm is known to lie in, and how intervals are written."""

from dataclasses import dataclass

#: Why a report leaves out a weight that the model does not use, which a product over its layers can do without.
DID_NOT_RUN = "its module did not run"


@dataclass(frozen=True)
class NormInterval:
    """Two-sided bound on an operator's largest singular value.

    The norm lies in [``lower``, ``upper``] with probability at least ``confidence`` over the random starts. ``lower``
    never depends on chance: an explicit vector attains it, up to the rounding that has been subtracted from it.

    Attributes:
        lower: lower side, >= 0.
        upper: upper side; never derived from the lower one, and infinite where the two contradict each other.
        confidence: probability that ``upper`` holds; 1.0 when the method is deterministic.
        method: what produced the upper side, such as "lanczos", "power", "svd" or "closed form".
        iterations: applications of the operator and its adjoint per start; 0 for exact methods.
        converged: whether ``upper <= lower * (1 + rtol)``.
    """

    lower: float
    upper: float
    confidence: float
    method: str
    iterations: int
    converged: bool

    @property
    def width(self) -> float:
        """Relative width ``upper / lower - 1``; 0 for the zero operator."""
        if self.upper == 0.0:
            return 0.0
        return self.upper / self.lower - 1.0 if self.lower > 0.0 else float("inf")

    def __str__(self) -> str:
        return f"[{self.lower:.6g}, {self.upper:.6g}] ({self.method}, confidence {confidence_text(self.confidence)})"


def width_text(interval: NormInterval) -> str:
    """An interval's relative width: a percentage such as "0.62%", or "exact"."""
    return f"{100.0 * interval.width:.2g}%" if interval.width >= 1e-6 else "exact"


def confidence_text(confidence: float) -> str:
    """A confidence as text: "1" or "1 - 1e-06"."""
    return "1" if confidence == 1.0 else f"1 - {1.0 - confidence:.2g}"
