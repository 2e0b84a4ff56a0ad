"""The loss on the validation rows while training."""

from collections.abc import Callable

import torch
from torch import nn

from ftkit.training.feed import Feed


@torch.no_grad()
def validation_losses(objective: nn.Module, feed: Feed, interrupted: Callable[[], bool]) -> dict[str, float] | None:
    """`eval_loss`, the token-weighted mean over all validation rows, and `eval_loss_NAME` for each data set.

    A collective.

    Args:
        objective: the prepared root module, Batch -> LossSums.
        feed: hands out the batches; its plan knows how many target tokens each set has.
        interrupted: asked before every batch, by all processes alike.

    Returns:
        None once `interrupted` says so.
    """
    world, sets = feed.world, feed.plan.validation
    objective.eval()
    losses: dict[str, float] = {}
    total_loss = total_targets = 0.0
    for name, examples in sets.items():
        loss = torch.zeros((), device=world.device)
        for batch in feed.validation(name):
            if interrupted():
                return None
            loss += objective(batch).loss
        loss_sum, targets = float(world.sum(loss)), int(examples.num_targets.sum())
        losses[f"eval_loss_{name}"] = loss_sum / targets
        total_loss, total_targets = total_loss + loss_sum, total_targets + targets
    return {"eval_loss": total_loss / total_targets, **losses}
