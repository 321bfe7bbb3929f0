"""Guards the exact selection of the k-th magnitude against a sort, on numbers of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from eutectic.linalg.select import magnitude_thresholds

WIDTHS = {torch.float32: np.float32, torch.float64: np.float64}


def by_sorting(rows: Tensor, density: float) -> Tensor:
    n = rows.shape[1]
    k = int(density * n)
    if k == 0:
        return torch.full((len(rows),), float("inf"), dtype=rows.dtype)
    if k == n:
        return torch.zeros(len(rows), dtype=rows.dtype)
    return rows.abs().sort(dim=1, descending=True).values[:, k - 1]


def thresholds_of(rows: Tensor, density: float, cuts: tuple[int, ...] = ()) -> Tensor:
    chunks = torch.tensor_split(rows, sorted(c % (rows.shape[1] + 1) for c in cuts), dim=1)
    return magnitude_thresholds(lambda: iter(chunks), density)


def stacks(dtype: torch.dtype, **elements) -> st.SearchStrategy[Tensor]:
    width = 8 * dtype.itemsize
    return hnp.arrays(
        WIDTHS[dtype],
        st.tuples(st.integers(1, 3), st.integers(1, 50)),
        elements=st.floats(width=width, allow_nan=False, **elements),
    ).map(torch.from_numpy)


@pytest.mark.parametrize("dtype", WIDTHS)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), density=st.floats(0, 1), cuts=st.lists(st.integers(0, 50), max_size=4))
def test_any_numbers_in_any_chunks(dtype, data, density, cuts):
    rows = data.draw(stacks(dtype))  # denormals, both zeros and infinities included
    assert torch.equal(thresholds_of(rows, density, tuple(cuts)), by_sorting(rows, density))


@pytest.mark.parametrize("dtype", WIDTHS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), density=st.floats(0, 1))
def test_many_equal_magnitudes(dtype, data, density):
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-20])
    shape = st.tuples(st.integers(1, 3), st.integers(1, 40))
    rows = torch.from_numpy(data.draw(hnp.arrays(WIDTHS[dtype], shape, elements=values)))
    assert torch.equal(thresholds_of(rows, density), by_sorting(rows, density))


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.2, 0.5, 0.9999])
def test_large_rows(dtype, density):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 200_001, generator=generator, dtype=dtype)
    found = thresholds_of(rows, density, (7, 100_000, 131_072))
    assert torch.equal(found, by_sorting(rows, density))
    assert (rows.abs() >= found.unsqueeze(1)).sum(1).tolist() == [int(density * 200_001)] * 2


@pytest.mark.parametrize("dtype", WIDTHS)
def test_neighbouring_numbers_are_told_apart(dtype):
    start = torch.tensor(1.0, dtype=dtype)
    above = torch.nextafter(start, torch.tensor(2.0, dtype=dtype))
    rows = torch.stack([start, -above, torch.zeros_like(start), start]).unsqueeze(0)
    assert thresholds_of(rows, 0.25).item() == above.item()
    assert thresholds_of(rows, 0.5).item() == 1.0


@pytest.mark.parametrize("dtype", WIDTHS)
def test_the_smallest_and_the_largest_numbers(dtype):
    limits = torch.finfo(dtype)
    smallest = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    rows = torch.tensor(
        [[0.0, float(smallest), -limits.tiny, -limits.max, float("inf")]], dtype=dtype
    )
    found = [thresholds_of(rows, k / 5).item() for k in (1, 2, 3, 4)]
    assert found == [float("inf"), limits.max, limits.tiny, float(smallest)]


def test_rows_do_not_mix():
    rows = torch.stack([torch.arange(10.0), 1000 * torch.arange(10.0)])
    assert thresholds_of(rows, 0.3).tolist() == [7.0, 7000.0]


@pytest.mark.parametrize(
    ("density", "threshold"), [(0.0, float("inf")), (0.05, float("inf")), (1.0, 0.0)]
)
def test_nothing_and_everything(density, threshold):
    assert thresholds_of(torch.ones(2, 10), density).tolist() == [threshold] * 2


def test_an_empty_stream():
    assert magnitude_thresholds(lambda: iter(()), 0.5).numel() == 0
    assert (
        magnitude_thresholds(lambda: iter([torch.ones(2, 0)]), 0.5).tolist() == [float("inf")] * 2
    )


def test_chunks_in_strided_memory():
    rows = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).mT
    assert torch.equal(thresholds_of(rows, 0.4), by_sorting(rows, 0.4))


def test_the_chunks_are_left_alone():
    rows = torch.tensor([[-3.0, 1.0, -2.0, 0.5]])
    thresholds_of(rows, 0.5)
    assert rows.tolist() == [[-3.0, 1.0, -2.0, 0.5]]
