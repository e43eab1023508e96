"""Ridge regression from sums, for gates that are fitted in closed form. C inputs, M rows."""

import torch
from torch import Tensor


class Moments:
    """Sums from which a ridge regression follows; they take C x C numbers, however many tokens they saw."""

    def __init__(self, dim: int, device: torch.device):
        self.count = 0
        self.sums = torch.zeros(dim + 1, dtype=torch.float64, device=device)  # of inputs and outcome
        self.products = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, outcomes: Tensor) -> None:
        """Take in inputs (M, C) and their outcomes (M,)."""
        rows = torch.cat([inputs, outcomes[:, None]], dim=1).double()
        self.count += len(rows)
        self.sums += rows.sum(0)
        self.products += rows.T @ rows

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Weights (C,), bias, and the share of the outcomes' variance that they explain."""
        mean = self.sums / self.count
        covariance = self.products / self.count - mean.outer(mean)
        inputs, cross, variance = covariance[:-1, :-1], covariance[:-1, -1], covariance[-1, -1]
        damped = inputs + ridge * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype).to(inputs)
        weight = torch.linalg.solve(damped, cross)
        explained = (2 * weight @ cross - weight @ inputs @ weight) / variance if variance > 0 else variance
        return weight, mean[-1] - weight @ mean[:-1], explained.item()
