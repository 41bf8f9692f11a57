from __future__ import annotations

import pytest
import torch

from bgcbench.errors import UsageError
from bgcbench.theory.leastsquares import Fit, shrink_to_white, shrunk, solve_normal


def test_dependent_regressors_give_the_solution_of_least_norm() -> None:
    z = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)  # rank 3 of 6
    y = torch.randn(50, 2, dtype=torch.float64)
    solved = solve_normal(z.T @ z, y.T @ z)
    expected = torch.linalg.lstsq(z, y, driver="gelsd").solution.T
    torch.testing.assert_close(solved, expected, rtol=1e-6, atol=1e-8)


def test_a_ridge_minimises_the_penalised_error() -> None:
    z, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    prior, ridge = torch.randn(2, 5, dtype=torch.float64), 0.3
    gram, cross = z.T @ z / 40, y.T @ z / 40
    lam = ridge * float(gram.trace()) / 5
    x = solve_normal(gram, cross, ridge=ridge, prior=prior).requires_grad_()
    loss = (y - z @ x.T).square().sum() / 40 + lam * (x - prior).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(gradient.abs().max()) < 1e-12


def test_a_negative_ridge_is_refused() -> None:
    with pytest.raises(UsageError, match="ridge=-1"):
        solve_normal(torch.eye(2), torch.eye(2), ridge=-1)


def test_shrinking_adds_white_noise_of_that_share_of_the_mean_power() -> None:
    moment = torch.tensor([[1.0, 0.5], [0.5, 3.0]], dtype=torch.float64)  # mean power 2
    assert shrink_to_white(moment, 0.5).tolist() == [[2.0, 0.5], [0.5, 4.0]]
    assert torch.equal(shrink_to_white(moment, 0.0), moment)
    with pytest.raises(UsageError, match="ridge=-1"):
        shrink_to_white(moment, -1)


def test_the_dense_kernel_of_a_shrunk_problem_is_pulled_towards_the_weights() -> None:
    weight, u, y = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, 1, 1), (4, 50), (3, 50)))
    moment, cross = u @ u.T / 50, y @ u.T / 50
    pull = 0.3 * float(moment.trace()) / 4
    # E|y - V u|^2 + pull |W - V|^2 as one least squares problem.
    design = torch.cat([u, (50 * pull) ** 0.5 * torch.eye(4, dtype=torch.float64)], 1)
    target = torch.cat([y, (50 * pull) ** 0.5 * weight.flatten(1)], 1)
    expected = torch.linalg.lstsq(design.T, target.T).solution.T
    found, _, _ = shrunk(weight, Fit(moment, cross, ridge=0.3))
    torch.testing.assert_close(found.flatten(1), expected)
