"""Probabilities freed of the preference for some labels that a prompt brings about by itself."""

from __future__ import annotations

import torch
from torch import Tensor


def calibration_bias(content_free: Tensor) -> Tensor:
    """What to add to log-probabilities (or scores) so that softmax gives calibrated ones: −log p_cf.

    Args:
        content_free: Mean probabilities of the labels for inputs without content, ``(…, labels)``.
    """
    return -content_free.clamp(min=1e-6).log()


def calibrate(probabilities: Tensor, content_free: Tensor) -> Tensor:
    """Probabilities W·p with W = diag(p_cf)⁻¹, scaled to sum to 1.

    A label that the prompt prefers whatever the text is gets less. The softmax that the paper puts on top changes no
    decision and is left out, so that a prompt without preference (p_cf uniform) changes nothing.

    Args:
        probabilities: ``(…, labels)``.
        content_free: Mean probabilities of the labels for inputs without content ("N/A", "", "[MASK]"), from the
            same prompt and demonstrations, ``(…, labels)``.

    Example:
        >>> calibrate(torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3]))
        tensor([0.3913, 0.6087])

    Reference:
        Zhao et al. 2021, "Calibrate Before Use: Improving Few-Shot Performance of Language Models".
    """
    return torch.softmax(probabilities.log() + calibration_bias(content_free), -1)
