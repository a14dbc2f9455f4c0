"""Labels beside what texts say: a labelled row's target is its label in part, and in part its text's opinion.

A label may err, or may as well have been another: a picture of a cat on a roof lies in one folder of the two. Its text
was read by a classifier of all texts and says so. Such targets are softer where classes are alike and righter where
labels are wrong. How far labels are believed, `kernel_head.label_share` finds by itself; prediction sees no text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextOpinion(nn.Module):
    """What the texts of labelled rows say of their classes, by the classifier that the textual head started at.

    ``share`` in 0 .. 1 is that of the labels. The buffers are not saved: prediction has no use for them.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, head: nn.Linear, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("weight", head.weight.detach().clone(), persistent=False)
        self.register_buffer("bias", head.bias.detach().clone(), persistent=False)

    @torch.no_grad()
    def forward(self, text: Tensor) -> Tensor:
        """Standardised texts (B, Dt) -> class probabilities (B, K)."""
        return torch.softmax(F.linear(text.to(self.weight), self.weight, self.bias), dim=1)

    @torch.no_grad()
    def correction(self, text: Tensor, labels: Tensor, paired: Tensor, smoothing: float) -> Tensor:
        """What is to be added to the smoothed targets of the rows, (B, K): rows that sum to 0, without a text zeros.

        ``text`` (B, Dt) standardised, ``labels`` (B,) int64 with -1 unlabelled, ``paired`` (B,) bool.
        """
        opinion: Tensor = self(text)
        classes = opinion.shape[1]
        chosen = labels[:, None] == torch.arange(classes, device=labels.device)
        label = (1 - smoothing) * chosen.to(opinion) + smoothing / classes
        return (1 - self.share) * (opinion - label) * ((labels >= 0) & paired)[:, None]
