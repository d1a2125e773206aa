"""Keep the fp32 weights that Adam updates, for a model that computes in 16 bits; not sharded."""

import torch
from torch import nn

from megatron_interbert.training.optimizer import Held, held_as


class MasterWeights:
    """Hold fp32 twins of a model's parameters; the model's own are rounded to `dtype` and follow.

    Gradients are accumulated in fp32 over a step's micro-batches. The memory for that is allocated
    when the first of them arrive and freed after the step, so the passes of a step with a single
    micro-batch run without it.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        # by kind, because the gradient norm treats each kind in another way
        self.followers = sorted(model.parameters(), key=held_as)
        self.twins = [nn.Parameter(follower.detach().float()) for follower in self.followers]

        for follower in self.followers:
            follower.data = follower.data.to(dtype)

        sizes = [twin.numel() for twin in self.twins]
        self._line = torch.empty(sum(sizes), dtype=torch.float32, device=self.twins[0].device)
        pieces = zip(self._line.split(sizes), self.twins, strict=True)
        self._gradients = [piece.view(twin.shape) for piece, twin in pieces]
        kinds = [held_as(follower) for follower in self.followers]
        self._sizes = [
            sum(size for size, of in zip(sizes, kinds, strict=True) if of == kind) for kind in Held
        ]
        self.drop_gradients()

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return (fp32 weight, the model's parameter that follows it) for all parameters."""
        return list(zip(self.twins, self.followers, strict=True))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the model's gradients to those held here, and clear them in the model.

        A missing gradient counts as zeros.
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

    def gradients(self) -> list[list[torch.Tensor]]:
        """Return the gradients held here of each kind of `Held`, flattened."""
        return [[part] if len(part) else [] for part in self._line.split(self._sizes)]

    def drop_gradients(self) -> None:
        """Drop the gradients and free their memory."""
        for twin in self.twins:
            twin.grad = None

        self._line.untyped_storage().resize_(0)  # its views remain, for the next step

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Round the fp32 weights into the model's parameters."""
        torch._foreach_copy_(self.followers, self.twins)

    @property
    def _holds_gradients(self) -> bool:
        return self._line.untyped_storage().nbytes() > 0
