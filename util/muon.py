"""Muon: momentum, then the nearest semi-orthogonal matrix as the update of a matrix of weights.

Keller Jordan's (https://kellerjordan.github.io/posts/muon); rule and constants are those of
torch.optim.Muon with adjust_lr_fn="match_rms_adamw": an update has RMS 0.2 lr, as AdamW's. That one
computes in bf16, matrix by matrix: 25 times slower on a processor without bf16 units. Here matrices
of one shape go together, in float32 on a CPU, and each head of attention is a matrix of its own: a
slightly other update, of fewer FLOPs.
"""

import torch


def orthogonalize(g, steps=5):
    """g (n, r, c) -> U V^T of each g = U S V^T, but with singular values between 0.7 and 1.2.

    Newton-Schulz: X <- a X + (b A + c A^2) X with A = X X^T, the short side first."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x.bfloat16() if x.is_cuda else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Groups of matrices, each cut into `heads` pieces, of rows or, if `by_columns`, columns."""

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum,
                                  "heads": 1, "by_columns": False})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in {p.shape: None for p in group["params"]}:
                self.update([p for p in group["params"] if p.shape == shape], group)

    def update(self, params, group):
        heads, by_columns, momentum = group["heads"], group["by_columns"], group["momentum"]
        pieces = []
        for p in params:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"].lerp_(p.grad, 1 - momentum)
            g = p.grad.lerp(m, momentum)  # Nesterov's
            pieces += (g.mT if by_columns else g).chunk(heads)
        size = max(pieces[0].shape)  # the RMS of a semi-orthogonal matrix is size ** -0.5
        for p, step in zip(params, orthogonalize(torch.stack(pieces)).split(heads), strict=True):
            step = step.flatten(0, 1).mT if by_columns else step.flatten(0, 1)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(step, alpha=group["lr"] * 0.2 * size**0.5)
