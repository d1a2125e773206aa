"""Exchange token rows with the ranks that hold their experts, forward and backward.

Ranks send each other different numbers of rows. They first tell each other how many, expert by
expert; the host waits for that once in a layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.parallel.collectives import group_size


class Exchange:
    """Bring rows that are sorted by expert to the ranks that hold these experts, and back.

    `counts` [experts], int64, are the rows that this rank has for each expert, of `rows` in all:
    padding and dropped ones have none. Each rank of the group holds an equal number of experts, in
    order. All ranks of the group must make the same calls, also those that have no rows.
    """

    def __init__(self, counts: torch.Tensor, group: dist.ProcessGroup | None, rows: int) -> None:
        self.group = group
        self.ranks = group_size(group)
        if self.ranks == 1:
            (self.held,) = read_counts([counts], rows)
            self.mine = sum(self.held)
            return

        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)

        to_ranks = counts.view(self.ranks, -1)
        from_ranks = received.view(self.ranks, -1)
        # rows to each rank, from each rank, and of each expert here from all ranks
        sizes = (to_ranks.sum(1), from_ranks.sum(1), from_ranks.sum(0))
        self.sent, self.received, self.held = read_counts(sizes, rows)
        self.mine = sum(self.sent)  # rows of this rank

        # rows arrive by rank, and from each by expert
        experts = torch.arange(from_ranks.shape[1], device=counts.device).repeat(self.ranks)
        expert_of_row = experts.repeat_interleave(received, output_size=sum(self.held))
        self._by_expert = expert_of_row.argsort(stable=True)
        self._by_rank = self._by_expert.argsort()

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """Return all ranks' rows for the experts here, sorted by expert: [sum(held), ..]; x is this
        rank's rows, sorted by expert.
        """
        return x if self.ranks == 1 else _Move.apply(x, self._send, self._return)

    def back(self, y: torch.Tensor) -> torch.Tensor:
        """Return the results for this rank's rows as it sorted them; y is those for the rows that
        `there` returned.
        """
        return y if self.ranks == 1 else _Move.apply(y, self._return, self._send)

    def _send(self, x: torch.Tensor) -> torch.Tensor:
        return self._all_to_all(x, self.sent, self.received).index_select(0, self._by_expert)

    def _return(self, y: torch.Tensor) -> torch.Tensor:
        by_rank = y.index_select(0, self._by_rank)
        return self._all_to_all(by_rank, self.received, self.sent)

    def _all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        result = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(result, x.contiguous(), received, sent, group=self.group)

        return result


def read_counts(sizes: Sequence[torch.Tensor], rows: int) -> list[list[int]]:
    """Read vectors of numbers of rows; waits for the device once.

    In a dry run, whose tensors have no content, `rows` are divided evenly instead
    (virtual/stand_ins.py).
    """
    together = torch.cat(list(sizes)).tolist()
    found = []
    for vector in sizes:
        found.append(together[: len(vector)])
        together = together[len(vector) :]

    return found


class _Move(torch.autograd.Function):
    """Move rows in the forward pass, and their gradients back in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        there: Callable[[torch.Tensor], torch.Tensor],
        back: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grad), None, None
