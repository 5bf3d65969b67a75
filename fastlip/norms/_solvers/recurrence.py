"""The bidiagonalisations of many operators, a chunk of steps at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlip.norms._solvers.batched_operator import BatchedOperator
from fastlip.norms._solvers.certificate import Array
from fastlip.norms._solvers.cuda_graphs import Replayed, Runner, worthwhile
from fastlip.norms._solvers.iteration_config import Indices
from fastlip.norms._solvers.start_vectors import rows_by_size

#: Steps whose vectors are allocated together; even, so that a pair of steps has its squares in one block.
BLOCK = 16
#: Vectors of all operators begin at multiples of so many elements, for kernels that move 16 bytes at a time.
_ALIGNED = 4
#: Below this norm of its next vector a start vector has exhausted its Krylov space, and only rounding is left.
_ENDED = 1e-30


class _Block(NamedTuple):
    """Memory of ``BLOCK`` steps."""

    vectors: Tensor  # b_i v_{i+1}, [BLOCK, flat]
    squares: Tensor  # of a_{i+1} and b_{i+1}, [BLOCK, 2, operators * starts]


class Recurrence:
    """A v_i = b_{i-1} u_{i-1} + a_i u_i and A^T u_i = a_i v_i + b_i v_{i+1} from every start vector.

    Steps only launch work, and all state stays where it is in memory: the host waits in :meth:`coefficients` and for a
    :class:`Reading`. On a GPU pairs of steps are replayed from a CUDA graph on memory of their own, and their vectors
    are copied to the basis.

    Attributes:
        active: operators that take part in steps, [operators] bool; written in place.
        steps: number of steps done so far, k.
        device: of all vectors.
    """

    def __init__(self, operators: BatchedOperator, starts: Tensor) -> None:
        """Begin at ``starts``, flat, of norm 1 up to rounding."""
        self._operators, self.device, self.steps = operators, operators.device, 0
        self.active = torch.ones(len(operators.vectors), dtype=torch.bool, device=self.device)
        count = operators.vectors[0].stop
        sizes = [(place.stop - place.start) // count for place in operators.domain]
        lengths = [
            torch.linalg.vector_norm(rows, dim=2, dtype=torch.float64).flatten()
            for rows in rows_by_size(starts, sizes, count)
        ]
        self._start = torch.cat(lengths).square()
        self._blocks: list[_Block] = []
        self._reserve(0)
        self._vector(0).copy_(starts)
        self._u = _vectors(2, operators.range[-1].stop, operators).zero_()
        self._half_steps = _HalfSteps(operators, self.active)
        self._pair: _Pair | None = None
        if worthwhile(self.device, operators.domain[-1].stop + operators.range[-1].stop):
            self.work_in_pairs(Replayed(self.device))

    def work_in_pairs(self, runner: Runner) -> None:
        """Take two steps at a time on fixed memory, run by ``runner``; to be called before any step."""
        self._pair = _Pair(self._half_steps, self._vector(0), self._start, self._u, runner)

    def _reserve(self, index: int) -> None:
        """Allocate memory for the vectors and squares of a step."""
        while index >= BLOCK * len(self._blocks):
            squares = torch.zeros(BLOCK, 2, self._start.numel(), dtype=torch.float64, device=self.device)
            self._blocks.append(_Block(_vectors(BLOCK, self._operators.domain[-1].stop, self._operators), squares))

    def _vector(self, index: int) -> Tensor:
        return self._blocks[index // BLOCK].vectors[index % BLOCK]

    def _squares(self, index: int) -> Tensor:
        return self._blocks[index // BLOCK].squares[index % BLOCK]

    def basis(self, operators: slice, count: int) -> list[Tensor]:
        """b_i v_{i+1} for i = 0 ... ``count`` - 1 of neighbours of one size, in parts [steps, operators, starts, N]."""
        places, own = self._operators.domain[operators], self._operators.vectors[operators.start]
        flat, starts = slice(places[0].start, places[-1].stop), own.stop - own.start
        parts = [block.vectors[:, flat].unflatten(1, (len(places), starts, -1)) for block in self._blocks]
        return [part[: count - i * BLOCK] for i, part in enumerate(parts) if count > i * BLOCK]

    def advance(self, count: int) -> None:
        """Launch ``count`` more steps of the active operators, or one more than that, without reading any result.

        The vectors and squares of the other operators are undefined from here on.
        """
        self._reserve(self.steps + count + 1)
        if self._pair is not None:
            for _ in range(0, count, 2):
                self._take(self._pair)
            return
        for _ in range(count):
            k = self.steps
            w, beta = self._vector(k), self._squares(k - 1)[1] if k else self._start
            u, before = self._u[k % 2], (self._u[1 - k % 2], self._squares(k - 1)[0]) if k else None
            self._half_steps(w, beta, u, self._squares(k), self._vector(k + 1), before)
            self.steps += 1

    def _take(self, pair: "_Pair") -> None:
        k = self.steps
        pair.run()
        self._vector(k + 1).copy_(pair.vectors[1])
        self._vector(k + 2).copy_(pair.vectors[0])
        self._blocks[k // BLOCK].squares[k % BLOCK : k % BLOCK + 2].copy_(pair.squares)
        self.steps += 2

    def matrices(self, count: int, operators: Indices) -> "Reading":
        """Diagonals and off-diagonals of T after ``count`` steps of some operators, [2, operators * starts, count].

        This only launches work, and begins a copy to the host.
        """
        squares = self._read(count)
        if len(operators) < len(self.active):
            chosen = torch.from_numpy(operators).to(self.device, non_blocking=True)
            squares = squares.unflatten(2, (len(self.active), -1))[:, :, chosen].flatten(2)
        found = squares.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
        off = found.prod(0).sqrt_()
        found[0, :, 1:] += found[1, :, :-1]
        found[1] = off
        return Reading(found)

    def coefficients(self, count: int) -> tuple[Array, Array]:
        """a_1 ... a_k, [operators * starts, k], and b_0 ... b_k, [operators * starts, k + 1], for k = ``count``.

        b_0 is the norm of the start vector. This reads once from the device.
        """
        start = torch.stack([torch.zeros_like(self._start), self._start])
        squares = torch.cat([start[None], self._read(count)])
        alpha, beta = squares.permute(1, 2, 0).contiguous().sqrt_().cpu().numpy()
        return alpha[:, 1:], beta

    def _read(self, count: int) -> Tensor:
        """Squares of a_i and b_i for i = 1 ... ``count``, [count, 2, operators * starts]."""
        parts = [block.squares[: count - i * BLOCK] for i, block in enumerate(self._blocks) if count > i * BLOCK]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Reading:
    """Numbers that are being copied to the host while the device goes on."""

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> Tensor:
        """Wait for the numbers, and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._numbers


class _HalfSteps:
    """One step, on memory that each call names."""

    def __init__(self, operators: BatchedOperator, active: Tensor) -> None:
        self._operators, self._active = operators, active

    def __call__(
        self, w: Tensor, beta: Tensor, u: Tensor, squares: Tensor, out: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> None:
        """Compute u from w = b_{k-1} v_k and the u before, the next w into ``out``, and the squared norms of both."""
        alpha = squares[0]
        earlier = {} if before is None else {"previous": before[0], "previous_square": before[1]}
        self._operators.forward(w, u, alpha, x_square=beta, active=self._active, **earlier)
        torch.threshold_(alpha, _ENDED**2, 0.0)
        earlier = {"previous": w, "previous_square": beta}
        self._operators.adjoint(u, out, squares[1], x_square=alpha, active=self._active, **earlier)
        torch.threshold_(squares[1], _ENDED**2, 0.0)


class _Pair:
    """Two steps on fixed memory: the first leaves its w in row 1, the second in row 0, where the next pair begins."""

    def __init__(self, half_steps: _HalfSteps, w: Tensor, square: Tensor, u: Tensor, runner: Runner) -> None:
        self._half_steps, self._u, self._runner = half_steps, u, runner
        self.vectors = w.new_empty(2, _room(w.numel()))[:, : w.numel()]
        self.vectors[0].copy_(w)
        # The first u that is subtracted is 0, as its square is: so the first step is like the others.
        self.squares = torch.zeros(2, 2, square.numel(), dtype=torch.float64, device=w.device)
        self.squares[1, 1].copy_(square)

    def run(self) -> None:
        self._runner(self._both)

    def _both(self) -> None:
        for i in range(2):
            before = self._u[1 - i], self.squares[1 - i, 0]
            w, beta, out = self.vectors[i], self.squares[1 - i, 1], self.vectors[1 - i]
            self._half_steps(w, beta, self._u[i], self.squares[i], out, before)


def _room(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _vectors(count: int, size: int, operators: BatchedOperator) -> Tensor:
    """Uninitialised vectors, [count, size], each of them aligned."""
    return torch.empty(count, _room(size), dtype=operators.dtype, device=operators.device)[:, :size]
