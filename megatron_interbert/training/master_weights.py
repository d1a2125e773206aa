"""The fp32 weights that Adam updates, of a model that computes in 16 bits; whole on every rank."""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_interbert.training.optimizer import is_sharded


class MasterWeights:
    """Keeps fp32 twins of a model's parameters, which are rounded to `dtype` here and follow them.

    Gradients are added up in fp32, however many micro-batches a step has. The memory for that is
    taken when the first of them arrive and given back after the step, so that the passes of a step
    with one micro-batch do without it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        # Replicated parameters first: the gradient norm counts these and the shards apart.
        self.followers = sorted(model.parameters(), key=is_sharded)
        self.twins = [nn.Parameter(follower.detach()) for follower in self.followers]

        for follower in self.followers:
            follower.data = follower.data.to(dtype)

        sizes = [twin.numel() for twin in self.twins]
        self._line = torch.empty(sum(sizes), dtype=torch.float32, device=self.twins[0].device)
        pieces = zip(self._line.split(sizes), self.twins, strict=True)
        self._gradients = [piece.view(twin.shape) for piece, twin in pieces]
        self._replicated = sum(p.numel() for p in self.followers if not is_sharded(p))
        self.drop_gradients()

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """List (fp32 weight, the model's parameter that follows it)."""
        return list(zip(self.twins, self.followers, strict=True))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the model's gradients to those held here, and remove them there.

        A parameter without a gradient counts as one with zeros.
        """
        new = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.followers]

        if self._holds_gradients:
            torch._foreach_add_(self._gradients, new)
        else:
            self._line.untyped_storage().resize_(self._line.nbytes)
            torch._foreach_copy_(self._gradients, new)

        for follower in self.followers:
            follower.grad = None

        for twin, gradient in zip(self.twins, self._gradients, strict=True):
            twin.grad = gradient

    def gradients(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Give what is held, flat: (of replicated parameters, of shards)."""
        return [self._line[: self._replicated]], [self._line[self._replicated :]]

    def drop_gradients(self) -> None:
        """Forget the gradients and give their memory back."""
        for twin in self.twins:
            twin.grad = None

        self._line.untyped_storage().resize_(0)  # views of it stay, for the next step

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Round the fp32 weights to those with which the model computes."""
        torch._foreach_copy_(self.followers, self.twins)

    @property
    def _holds_gradients(self) -> bool:
        return self._line.untyped_storage().nbytes() > 0
