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
        "Log-probability of the chosen completions (of pairs; else the desirable ones, or the best of rankings) "
        "now less that at the start of the run (nats, summed over tokens), mean. Below 0 the policy is losing "
        "them (likelihood displacement)."
    ),
    "displacement/chosen_per_token": "displacement/chosen, per token of the completion.",
    "displacement/fell": (
        "Share of the chosen completions that are less likely than at the start of the run. dpop, cal_dpo "
        "or an added sft term hold them."
    ),
    "accuracy": (
        "Share of pairs in which the reward model scores the chosen completion higher (of steps, for process "
        "rewards: that it takes for what they are labelled); ties count half."
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
    "scores/right": "Log-odds that a step is right, by the reward model in training: mean over steps labelled right.",
    "scores/wrong": "The same over steps labelled wrong. It should fall below 0.",
    "scores/agree": "Share of pairs whose given scores have the order of the pair; the others teach nothing.",
    "absolute_error": "Distance of a regression model's outputs from the given scores, over those there are, mean.",
    "below": "Share of the quantile levels under which the given score lies; the levels' mean if they are right.",
    "level": "Strength of the preferences as the ordinal loss reads them: 0 is a tie, mean.",
    "target": "Margin that is asked of a pair, mean.",
    "delta": "Threshold between desirable and undesirable rewards, a moving average of both classes' means.",
    "beta": "The beta of this batch, where the objective chooses it by the batch.",
    "kept": "Share of the pairs that count; the others are set aside as outliers.",
    "capped": "Share of sampled tokens whose weight is held at its cap. They still teach.",
    "penalty": "What is taken off the margin because the chosen completion fell below its start, in nats, mean.",
    "offsets": "Margin that is asked for beyond 0 because of the gap of the given scores, mean.",
    "nll/chosen": "Negative log-likelihood of the chosen completions as it is in the loss, mean.",
    "log_odds_ratio": "Log-odds of the chosen completion less that of the rejected one, per token, mean.",
    "logps": "Log-probability of the sampled completions (nats, summed over tokens), mean.",
    "weights": "Weight that a pair counts with, mean. Near 0 the data are far from what the policy writes.",
    "kl/chosen": "KL from the reference, summed over the tokens of chosen completions, over the vocabulary, mean.",
    "kl/rejected": "KL from the reference, summed over the tokens of rejected completions, mean.",
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
    "rm_accuracy": (
        "Share of held-out pairs whose preferred completion scores higher; ties count half. By slice: "
        "rm_accuracy/length=…, /votes=…, /domain=…, /source=…, /chosen_from=…. Read it beside rm_ceiling."
    ),
    "longer_wins": "Share of pairs whose preferred completion has more words: what 'take the longer' would get.",
    "shorter_wins": "Share of pairs whose preferred completion has fewer words.",
    "rm_over_length": (
        "rm_accuracy less the accuracy of the better length rule on the same pairs. At 0 the model may know "
        "nothing but length."
    ),
    "rm_ceiling": (
        "The accuracy of a model that knows which side most annotators would prefer: the labels are noisy, so no "
        "model can pass it in expectation. From votes of several annotators on one pair; without any it can't be "
        "known. rm_ceiling/one_vote is for labels of a single vote."
    ),
    "rm_agreement": "How often two annotators of a pair agree. Less than rm_ceiling: both are noisy.",
    "rm_ece": (
        "Calibration error: mean distance between confidence, sigmoid(|margin| / temperature), and how often the "
        "model is right, in bins of equally many pairs. Never 0 on few pairs: see rm_ece/by_chance. "
        "rm_ece/fitted is with a temperature from the other half of the prompts."
    ),
    "rm_brier": "Mean (P(preferred wins) − label)². 0.25 is a coin, 0 certain and right.",
    "rm_temperature": (
        "The temperature at which sigmoid(margin / temperature) fits the labels best. Above 1 the margins promise "
        "too much."
    ),
    "rm_reliability": "How often the model is right in one bin of confidence; the notes give the confidence.",
    "probe": (
        "How often the model prefers a completion that was spoilt in a known way to the good one it was made from: "
        "empty, repeated, looped, truncated, flattering, boasting, keywords, boilerplate. Should be near 0."
    ),
    "bon_gold": (
        "The score, by another judge, of the best of n completions as the model picks it; exact over all choices "
        "of n. n=1 is a random one."
    ),
    "bon_oracle": "The same, picked by that score itself: the most that best of n can reach.",
    "bon_recovered": "(model − random) / (oracle − random) at the largest n: the share of what can be gained.",
    "bon_kl_bound": "log n − (n − 1)/n nats: best of n is no farther than this from the policy that was sampled.",
    "gold": "True worth of a completion in the embedded world, where it is known. Higher is better.",
    "fact_accuracy": (
        "Share of fact questions of the embedded world answered with the right value and no wrong one."
    ),
    "flattery": "Flattering sentences per completion in the embedded world.",
    "words": "Words per completion.",
}

__all__ = ["METRICS"]
