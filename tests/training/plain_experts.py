"""Compute experts in the plainest way, to compare with: no exchange, no sorting, loops over groups,
prototypes, experts and tokens.
"""

import math

import torch
import torch.nn.functional as F


def use_plain_experts(model, capacity_factor=0.0):
    """Let a model's layers compute their experts by plain loops over the same parameters."""
    for name in ("interaction", "text_stream", "image_stream"):
        for layer in getattr(model, name).layers:
            layer.mlp.forward = PlainExperts(layer.mlp, capacity_factor)


class PlainExperts:
    """Hold a layer's `Experts` and compute what they should."""

    def __init__(self, experts, capacity_factor):
        self.router = experts.router.weight
        self.up = experts.experts.up
        self.down = experts.experts.down
        self.prototypes = experts.router.prototypes
        self.capacity_factor = capacity_factor

    def __call__(self, x, tokens):
        choices = len(self.router) // self.prototypes
        gates = self.router.double().view(self.prototypes, choices, -1)
        probabilities = [F.softmax(x.double() @ gate.T, dim=1) for gate in gates]
        chosen = [rows.argmax(dim=1) for rows in probabilities]
        expert = torch.stack([rows + choices * number for number, rows in enumerate(chosen)], dim=1)
        fits = [[True] * self.prototypes for _ in range(len(x))]
        if self.capacity_factor:
            fits = plain_capacity(
                expert.tolist(),
                tokens.groups.of_row.tolist(),
                tokens.groups.position.tolist(),
                len(self.router),
                self.capacity_factor,
            )

        fits = torch.tensor(fits).view(len(x), self.prototypes)
        result = torch.zeros_like(x)
        for number, of_expert in enumerate(probabilities):
            for one in range(choices):
                rows = ((chosen[number] == one) & fits[:, number]).nonzero()[:, 0]
                weight = of_expert[rows, one, None].to(x.dtype)
                result = result.index_add(
                    0, rows, weight * self.one(x[rows], number * choices + one)
                )

        loads = [int((expert == one).sum()) for one in range(len(self.router))]
        figures = [*loads, int((~fits).sum()), 0.0, 0.0, len(x)]
        balance = x.new_zeros(())
        if tokens.groups is not None:
            balance = plain_balance(probabilities, chosen, tokens.groups.of_row)

        return result, (balance, torch.tensor(figures, dtype=torch.float64))

    def one(self, x, expert):
        """Return an expert's results for its rows."""
        inner = x @ self.up.weight[expert].T + self.up.bias[expert]
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))

        return inner @ self.down.weight[expert].T


def plain_balance(probabilities, chosen, group):
    """Return the sum over groups of the mean over prototypes of choices x sum(share x mean)."""
    total = 0.0
    for one in group.unique():
        for of_expert, best in zip(probabilities, chosen, strict=True):
            inside = of_expert[group == one]
            choices = inside.shape[1]
            shares = F.one_hot(best[group == one], choices).double().mean(dim=0)
            total = total + choices * (shares * inside.mean(dim=0)).sum() / len(probabilities)

    return total


def plain_capacity(expert, group, position, experts, factor):
    """Return which choices fit, by a loop over tokens in the order of positions."""
    tokens = len(expert)
    room = {}
    fits = [[False] * len(choices) for choices in expert]

    for token in sorted(range(tokens), key=lambda token: position[token]):
        size = group.count(group[token])
        capacity = math.ceil(size * len(expert[token]) * factor / experts)
        for place, chosen in enumerate(expert[token]):
            taken = room.get((group[token], chosen), 0)
            fits[token][place] = taken < capacity
            room[group[token], chosen] = taken + 1

    return fits
