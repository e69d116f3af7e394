"""The mutual loss: mean Kullback-Leibler divergence between a client and its peers, from one target.

With P the client's distribution and P_j its peers', all softened by the same temperature T:

* own || peer: ``mean_j KL(P || P_j) = sum_c P (log P - g)`` with ``g = mean_j log P_j`` (arXiv:2503.05803);
* peer || own: ``mean_j KL(P_j || P) = CE(q, P) - h`` with ``q = mean_j P_j``, ``h = mean_j H(P_j)``
  (arXiv:1706.00384).

Both are exact: value and gradient equal the all-pairs form. Losses are in nats, averaged over samples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_logits(outputs: Tensor) -> Tensor:
    """Return class scores [N, C] from a model's outputs; one column z (log-odds of class 1) becomes [0, z].

    >>> as_logits(torch.tensor([[2.0]]))
    tensor([[0., 2.]])
    """
    if outputs.shape[1] > 1:
        return outputs
    return torch.cat([torch.zeros_like(outputs), outputs], dim=1)


def own_peer(logits: Tensor, log_target: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean over the peers of KL(own || peer), in nats.

    Parameters
    ----------
    logits : Tensor [N, C]
        The client's class scores.
    log_target : Tensor [N, C]
        ``mean_j log P_j``, softened by the same temperature, unnormalised.
    """
    log_p = torch.log_softmax(logits / temperature, dim=1)
    return (log_p.exp() * (log_p - log_target)).sum(dim=1).mean()


def peer_own(logits: Tensor, log_target: Tensor, entropies: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean over the peers of KL(peer || own), in nats.

    Parameters
    ----------
    logits : Tensor [N, C]
        The client's class scores.
    log_target : Tensor [N, C]
        ``log mean_j P_j``.
    entropies : Tensor [N]
        ``mean_j H(P_j)``; a constant, which shifts the loss but not the gradient.
    """
    log_p = torch.log_softmax(logits / temperature, dim=1)
    return (-(log_target.exp() * log_p).sum(dim=1) - entropies).mean()


def published_code(logits: Tensor, log_target: Tensor) -> Tensor:
    """Return ``p log(p / q)`` for class 1 alone, as in the paper's published code.

    It is not a divergence: it can be negative and has its minimum at ``p = q / e``. Two classes only; kept to
    reproduce the paper's table.
    """
    log_p = torch.log_softmax(logits, dim=1)[:, 1]
    return (log_p.exp() * (log_p - log_target[:, 1])).mean()


def mutual_loss(
    divergence: str, logits: Tensor, log_target: Tensor, entropies: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """Return the loss of the chosen divergence; see the functions above.

    Raises
    ------
    ValueError
        If ``divergence`` is unknown, or ``peer_own`` comes without entropies.
    """
    if divergence == "own_peer":
        return own_peer(logits, log_target, temperature)
    if divergence == "published_code":
        return published_code(logits, log_target)
    if divergence == "peer_own" and entropies is not None:
        return peer_own(logits, log_target, entropies, temperature)
    raise ValueError(
        f"unknown divergence {divergence!r} {'without' if entropies is None else 'with'} entropies"
    )
