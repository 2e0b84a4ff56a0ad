"""What A and B of a LoRA start from.

At least one of them must differ from zero: the gradient of A is formed with B, and that of B with A.

Shape suffixes: I input width, O output width, R rank.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ftkit.errors import UserError

Factors = tuple[Tensor, Tensor]
"""A [R, I] and B [O, R], float32 on the CPU."""
OVERSAMPLING, POWER_ITERATIONS = 8, 4
"""Of the randomised singular value decomposition; the paper on PiSSA finds four iterations as good as the exact one."""


def kaiming(weight_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> Factors:
    """A Kaiming-uniform, B zero, as in the code of LoRA's paper.

    https://github.com/microsoft/LoRA/blob/4c0333854cb905966f8cc4e9a74068c1e507c7b7/loralib/layers.py#L119
    """
    a_RI = torch.empty(rank, weight_OI.shape[1])
    nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
    return a_RI, torch.zeros(weight_OI.shape[0], rank)


def gaussian(weight_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> Factors:
    """A normal with a standard deviation of 1 / rank, B zero: peft's and diffusers' `gaussian`."""
    a_RI = torch.empty(rank, weight_OI.shape[1]).normal_(std=1.0 / rank, generator=generator)
    return a_RI, torch.zeros(weight_OI.shape[0], rank)


def pissa(weight_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> Factors:
    """The weight's largest singular components: scale * B A is its best approximation of this rank.

    PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948, equations 2 and 3). The decomposition is randomised,
    which costs a fraction of the exact one: whatever it finds is taken off the weight again, see `LowRankLinear`.

    Raises:
        UserError: the weight has no such rank.
    """
    out_features, in_features = weight_OI.shape
    if rank > min(out_features, in_features):
        what = f"a weight of {out_features} x {in_features} has no {rank} singular components for init: pissa"
        raise UserError(what, how=f"a rank of at most {min(out_features, in_features)}", key=("method", "rank"))
    if weight_OI.is_meta:
        return torch.zeros(rank, in_features), torch.zeros(out_features, rank)
    with torch.random.fork_rng(devices=[]):
        # svd_lowrank draws from the global generator.
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        columns = min(rank + OVERSAMPLING, out_features, in_features)
        u_OC, values_C, v_IC = torch.svd_lowrank(weight_OI.detach().float(), columns, niter=POWER_ITERATIONS)
    root_R = (values_C[:rank] / scale).sqrt()
    return (root_R[:, None] * v_IC[:, :rank].t()).contiguous(), u_OC[:, :rank] * root_R


INITIALISATIONS: dict[str, Callable[[Tensor, int, float, torch.Generator], Factors]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "pissa": pissa,
}
"""`method.init` -> A and B for a weight [O, I], a rank and a scale."""


def zeros(weight_OI: Tensor, rank: int) -> Factors:
    """Factors to load saved ones into."""
    return torch.zeros(rank, weight_OI.shape[1]), torch.zeros(weight_OI.shape[0], rank)
