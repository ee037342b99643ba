"""What the numbers mean that commands write and print: ``steerwell explain NAME``."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "loss": (
        "The objective, averaged over the step by its own reduction. Losses of two objectives don't compare."
    ),
    "eval/loss": "The loss on held-out groups. Every metric of training has an eval/ twin.",
    "grad_norm": "Length of the gradient before clipping. A sudden rise comes before most failures.",
    "learning_rate": "Learning rate of the step, after warm-up and schedule.",
    "step": "Optimizer steps done.",
    "tokens": "Tokens read so far, prompts counted once.",
    "rewards/chosen": "Implicit reward of chosen completions: beta × (log-prob − reference log-prob), mean.",
    "rewards/rejected": (
        "Implicit reward of rejected completions: beta × (log-prob − reference log-prob), mean."
    ),
    "rewards/margins": (
        "rewards/chosen − rewards/rejected, per pair, mean. Grows without end where the loss allows it."
    ),
    "rewards/accuracies": (
        "Share of pairs whose chosen completion has the higher implicit reward; ties count half."
    ),
    "logps/chosen": (
        "Log-probability of chosen completions (nats, summed over tokens), mean. When it falls, the "
        "policy loses the good completions too; an added sft term holds them."
    ),
    "logps/rejected": "Log-probability of rejected completions (nats, summed over tokens), mean.",
    "displacement/chosen": (
        "Log-probability of the chosen completions now less that at the start of the run (nats, summed over "
        "tokens), mean. Below 0 the policy is losing them (likelihood displacement)."
    ),
    "displacement/chosen_per_token": "displacement/chosen, per token of the completion.",
    "displacement/fell": (
        "Share of the pairs whose chosen completion is less likely than at the start of the run. dpop, cal_dpo "
        "or an added sft term hold them."
    ),
    "accuracy": (
        "Share of pairs in which the reward model scores the chosen completion higher; ties count half."
    ),
    "margin": "Score of chosen − score of rejected, mean.",
    "disagreement": (
        "Spread of the members of an ensemble over the margin of a pair (standard deviation), mean over pairs. "
        "Where it is large the score is a guess."
    ),
    "corr/quality_length": (
        "Correlation of the quality output with the length in tokens, over the completions of a step. odin_pairs "
        "pulls it to 0."
    ),
    "corr/length_length": (
        "Correlation of the length output with the length in tokens, over the completions of a step. odin_pairs "
        "pulls it to 1."
    ),
    "scores/chosen": "Score of chosen completions by the reward model in training, mean.",
    "scores/rejected": "Score of rejected completions by the reward model in training, mean.",
    "kl": "Distance of the policy from its reference in nats, estimated on its own samples.",
    "kl/k1": "KL from the reference per completion, the log-ratio itself: unbiased, can be below 0.",
    "kl/k3": "KL from the reference per completion, ratio − 1 − log-ratio: unbiased, never below 0.",
    "ratio": "Probability of a sampled token now / when it was sampled. 1 on fresh samples.",
    "clipped": "Share of tokens (or samples) whose ratio was clipped: they teach nothing in this step.",
    "reward": (
        "The judge's score of the sampled completions, mean: the proxy. Watch it beside a judge that was "
        "not trained against."
    ),
    "reward/std": "Spread of the judge's scores over all samples of the step.",
    "reward/group_std": (
        "Spread of the judge's scores within a prompt's samples. At 0 a group teaches nothing."
    ),
    "reward/missing": "Share of the samples without a verdict. They take no part in the update.",
    "completions/tokens": "Length of the sampled completions in tokens, mean.",
    "completions/finished": "Share of samples that ended by themselves. The others were cut off.",
    "win_rate": "How often a judge prefers this policy's completion to the baseline's; ties count half.",
    "over_refusal": (
        "Share of benign prompts that are refused, fully or in part. Read it beside harmful_compliance."
    ),
    "harmful_compliance": "Share of harmful prompts that are not refused. Read it beside over_refusal.",
    "pair_accuracy": (
        "Share of held-out pairs that are ordered as the annotators ordered them; ties count half."
    ),
    "gold": "True worth of a completion in the embedded world, where it is known. Higher is better.",
    "fact_accuracy": (
        "Share of fact questions of the embedded world answered with the right value and no wrong one."
    ),
    "flattery": "Flattering sentences per completion in the embedded world.",
    "words": "Words per completion.",
}

__all__ = ["METRICS"]
