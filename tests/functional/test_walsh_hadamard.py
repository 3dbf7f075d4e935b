from __future__ import annotations

import pytest
import scipy.linalg
import torch

from lightning_ft.functional.walsh_hadamard import walsh_hadamard


@pytest.mark.parametrize("bits", range(11))
def test_is_the_product_with_the_dense_matrix(bits: int) -> None:
    values = torch.randn(2, 3, 1 << bits, dtype=torch.double)
    dense = torch.tensor(scipy.linalg.hadamard(1 << bits), dtype=torch.double)
    torch.testing.assert_close(walsh_hadamard(values), values @ dense)


def test_is_its_own_inverse_but_for_n() -> None:
    """Whole numbers stay exact: there is no product in it."""
    values = torch.randint(-8, 8, (1 << 15,)).float()
    assert torch.equal(walsh_hadamard(walsh_hadamard(values)), (1 << 15) * values)


def test_no_setting_of_matrix_precision_touches_it() -> None:
    values = torch.randn(1 << 10)
    expected = walsh_hadamard(values)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(walsh_hadamard(values), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_leaves_its_argument_alone_and_takes_views() -> None:
    values = torch.randn(8, 4)
    before = values.clone()
    assert torch.equal(walsh_hadamard(values.T), walsh_hadamard(before.T.contiguous()))
    assert torch.equal(values, before)


def test_gradient_is_exact_to_the_second_order() -> None:
    values = torch.randn(2, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(walsh_hadamard, values)
    assert torch.autograd.gradgradcheck(walsh_hadamard, values)


@pytest.mark.parametrize("shape", [(3,), (4, 6), (0,), ()])
def test_refuses_what_is_no_power_of_two(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="its last dimension must be a power of two"):
        walsh_hadamard(torch.zeros(shape))


def test_a_large_one_in_pieces_is_made_of_two_smaller_ones() -> None:
    first, second = (torch.randint(-8, 8, (1 << 21,)).float() for _ in range(2))
    added, taken = walsh_hadamard(first), walsh_hadamard(second)
    whole = walsh_hadamard(torch.cat([first, second]))
    assert torch.equal(whole, torch.cat([added + taken, added - taken]))
