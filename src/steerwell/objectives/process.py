"""Objectives for process reward models: the learnt tensor is ``step_scores`` (U,), one log-odds per step."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.table import Metrics, objective


@objective(
    unit="step",
    kind="reward",
    source="arXiv:2305.20050 (labels of steps by people); arXiv:2312.08935, the loss of the PRM and its hard and soft "
    "estimates",
)
def process_reward(step_scores: Tensor, step_labels: Tensor) -> tuple[Tensor, Metrics]:
    """Process reward model: each step of a completion is classified as right or wrong.

    Formula:
        loss = -y log s(r) - (1 - y) log s(-r), for each step with a label
        with r the score at the step's last token and y = step_labels, the probability that the step is right
    Returns:
        losses (one per step that has a label), ln 2 for a score of 0; accuracy (ties count half) over steps whose
        label is not 0.5; scores/right and scores/wrong, the mean score of steps with a label above and below it
    Differs:
        arXiv:2305.20050 has a language model name one of three classes (right, neutral, wrong) in a single token.
        Here a linear head gives one number, and what becomes of neutral is said where data are read.
        Labels from sampling are taken as they are: hard ones are 0 or 1, soft ones the share of continuations that
        came out right. The papers' loss sums over the steps of a solution; here every labelled step of the batch
        weighs the same, or with reduction = "step_sequence_mean" every completion.
    Failure modes:
        A step without a label teaches nothing, and is not counted.
        Labels after the first wrong step say little: drop them where data are resolved (after_first_error).
        Most steps are right: an accuracy as high as their share has learnt nothing. Look at scores/wrong.
        Soft labels are the value of a step to the policy that was sampled, not its truth (arXiv:2501.07301).
    Use when:
        Steps of reasoning are labelled, by people or by sampling, and a scorer is wanted that says where one goes
        wrong: for best-of-n, for search, or as the reward of policy gradients.
    """
    known = ~step_labels.isnan()
    scores, labels = step_scores[known], step_labels[known]
    losses = -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)
    seen = scores.detach()
    right, wrong = labels > 0.5, labels < 0.5
    agree = ((2 * labels - 1).sign() * seen.sign() + 1) / 2
    metrics = {
        "accuracy": agree[right | wrong],
        "scores/right": seen[right],
        "scores/wrong": seen[wrong],
    }
    return losses, metrics


__all__ = ["process_reward"]
