"""Which lane holds what when operator_step_ multiplies on matrix units, against PTX's definition of the instruction.

Compiles csrc/kernels/cuda/operator_mma.h for the CPU, which takes g++ and CUDA's headers.
"""

import ctypes
import subprocess

import numpy as np
import pytest
from test_cuda_source import COMPILER, HERE, SOURCES, cuda_headers

LANES, WARPS, STEPS, BLOCK, DEPTH = np.arange(32), 2, 2, 64, 16
#: PTX, mma.m16n8k8 for .tf32: row and product of a[i], product and column of b[i], row and column of c[i].
GROUP, THREAD = LANES // 4, LANES % 4
A = [(GROUP + 8 * (i % 2), THREAD + 4 * (i // 2)) for i in range(4)]
B = [(THREAD + 4 * i, GROUP) for i in range(2)]
C = [(GROUP + 8 * (i // 2), 2 * THREAD + i % 2) for i in range(4)]


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> ctypes.CDLL:
    headers = cuda_headers()
    if COMPILER is None or headers is None:
        pytest.skip("needs g++ and CUDA's headers")
    out = tmp_path_factory.mktemp("maps") / "maps.so"
    source = HERE / "host_cuda/matrix_maps.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{SOURCES}", f"-I{headers}", str(source)]
    subprocess.run([*command, "-o", str(out)], check=True, timeout=120)
    return ctypes.CDLL(str(out))


def each_lane(function, *arguments: int) -> np.ndarray:
    return np.array([function(int(lane), *arguments) for lane in LANES])


def products_of(maps: ctypes.CDLL, step: int) -> list[np.ndarray]:
    return [each_lane(maps.product, step, i) for i in range(2)]


def test_every_product_is_taken_once(maps):
    """Squares of all shapes, multiplied tile by tile as the lanes' maps say, are products of whole numbers."""
    rng = np.random.default_rng(0)
    weights, columns = rng.integers(-99, 99, (BLOCK, DEPTH)), rng.integers(-99, 99, (DEPTH, BLOCK))
    rows = [[each_lane(maps.row, m, i) for i in range(2)] for m in range(4)]
    products = [products_of(maps, step) for step in range(STEPS)]
    a, b = np.zeros((STEPS, 4, 16, 8), int), np.zeros((STEPS, 8, 8, 8), int)
    for step in range(STEPS):
        for m in range(4):
            for i, slot in enumerate(A):
                a[(step, m, *slot)] = weights[rows[m][i % 2], products[step][i // 2]]
    for lanes in (16, 32, 48, 64):
        for width in range(1, BLOCK + 1):
            got = np.zeros((BLOCK, BLOCK), int)
            shape = (lanes, width)
            for warp in range(WARPS):
                first = maps.first_column(*shape, warp)
                for step in range(maps.split(*shape, warp), STEPS, maps.splits(*shape)):
                    for n in range(maps.column_tiles(*shape)):
                        for i, slot in enumerate(B):
                            b[(step, n, *slot)] = columns[products[step][i], first + each_lane(maps.column, n)]
                        for m in range(maps.row_tiles(*shape)):
                            sums = a[step, m] @ b[step, n]
                            for i, slot in enumerate(C):
                                to = rows[m][i // 2], first + each_lane(maps.sum_column, n, i % 2)
                                got[to] += sums[slot]
            want = weights @ columns
            assert (got[:lanes, :width] == want[:lanes, :width]).all(), shape
            assert (got[lanes:] == 0).all(), shape


def test_what_half_a_warp_touches_lies_in_different_banks(maps):
    """And rows begin at multiples of 16 bytes, which asynchronous copies and reads of four numbers take."""
    rows, depth = BLOCK + maps.row_padding(), DEPTH + maps.product_padding()
    assert rows % 4 == depth % 4 == 0
    for half in (slice(0, 16), slice(16, 32)):
        for tile in range(4):
            row, column = each_lane(maps.row, tile, 0), each_lane(maps.column, tile)
            for step in range(STEPS):
                for product in products_of(maps, step):
                    different(product * rows + row, half)
                different(column * depth + products_of(maps, step)[0], half)
            for i in range(2):
                different(each_lane(maps.sum_column, tile, i) * rows + row, half)


def different(address: np.ndarray, half: slice) -> None:
    """Pairs of words from ``address`` on, of 32 banks."""
    assert (address % 2 == 0).all()
    assert len(set(address[half] // 2 % 16)) == 16


def test_the_second_of_a_pair_is_beside_the_first(maps):
    for tile in range(4):
        assert (each_lane(maps.row, tile, 1) == each_lane(maps.row, tile, 0) + 1).all()
    for step in range(STEPS):
        first, second = products_of(maps, step)
        assert (second == first + 1).all()


def split(maps: ctypes.CDLL, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = np.ascontiguousarray(x, np.float32)
    large, small = np.zeros(x.shape, np.uint32), np.zeros(x.shape, np.uint32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, large, small)]
    maps.split_tf32(pointers[0], ctypes.c_int64(x.size), *pointers[1:])
    assert not ((large | small) & 0x1FFF).any()
    return large.view(np.float32).astype(float), small.view(np.float32).astype(float)


def test_two_tf32_numbers_hold_all_but_a_bit(maps):
    rng = np.random.default_rng(0)
    exponents = np.arange(-100, 127)
    signs = rng.choice([-1, 1], exponents.size)
    x = (signs * np.ldexp(rng.uniform(1, 2, (2000, exponents.size)), exponents)).astype(np.float32)
    edges = np.float32(1) + np.arange(2**13, dtype=np.float32) * np.float32(2**-23)  # all patterns of the last bits
    for numbers in (x, edges, -edges, np.float32([0.0, -0.0, 2.0**-126, 2.0**-149, 3.0e-39])):
        large, small = split(maps, numbers)
        lost = np.abs(large + small - numbers.astype(float))
        assert (lost <= np.maximum(2.0**-22 * np.abs(numbers), 2.0**-136)).all()
        assert (np.abs(large - numbers) <= np.maximum(2.0**-11 * np.abs(numbers), 2.0**-136)).all()


def test_what_is_not_finite_stays_so(maps):
    large, small = split(maps, np.float32([np.inf, -np.inf, np.nan, np.finfo(np.float32).max]))
    with np.errstate(invalid="ignore"):
        assert np.isnan(large + small).all()
        assert np.isnan(split(maps, np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32))[1]).all()
