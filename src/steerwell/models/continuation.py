"""Let a policy go on with a turn that has begun: samples that all begin with the same tokens of the assistant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, canonical, digest
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.models.load import Policy
from steerwell.models.render import tokenize_groups
from steerwell.models.sampler import Progress, generate


def continuations(
    policy: Policy,
    begun: Sequence[Completion],
    n: int = 1,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[CompletionGroup]:
    """Sample ``n`` completions of the prompt of every one of ``begun`` that begin as it does: a group for each.

    What has begun is one assistant message that is taken as unfinished. Sampled completions keep their tokens; a text
    is tokenised as far as it goes, so end it where the policy could have ended a token. The completions carry all
    their tokens, those of the beginning first; ``old_logps`` only where the beginning has them too, ``finished`` as
    sampled. The other arguments are those of :func:`steerwell.models.sampler.generate`.

    Raises :class:`InputError` as that does, for completions of several messages, and for those that have ended.
    """
    for one in begun:
        if len(one.messages) != 1 or one.messages[0].role != "assistant":
            raise InputError(
                f"only one assistant message can be continued, got {[m.role for m in one.messages]}",
                mend="Put the messages before it into the prompt.",
            )
    groups = [CompletionGroup(one.prompt, (replace(one, finished=False),)) for one in begun]
    sequences = [made.sequences[0] for made in tokenize_groups(policy.tokenizer, groups)]
    for one, sequence in zip(begun, sequences, strict=True):
        if sequence.ids[-1] in policy.stop_ids:
            raise InputError(
                f"a completion has ended already: {one.text[:60]!r}", mend="Leave its end token out."
            )
    drawn = generate(
        policy.model,
        [sequence.ids for sequence in sequences],
        n,
        stop=policy.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        greedy=greedy,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    how = {"max_new_tokens": max_new_tokens, "temperature": float(temperature), "greedy": greedy}
    revision, seen = policy.digest(), Counter[str]()
    found: list[CompletionGroup] = []
    for one, sequence, samples in zip(begun, sequences, drawn, strict=True):
        asked, own = tuple(sequence.ids[: sequence.n_prompt]), tuple(sequence.ids[sequence.n_prompt :])
        start = digest(sequence.ids)
        known = one.old_logps if one.old_logps is not None and len(one.old_logps) == len(own) else None
        completions = []
        for k, sampled in enumerate(samples):
            ids = own + sampled.token_ids
            words = str(policy.tokenizer.decode(list(ids), skip_special_tokens=True))
            completions.append(
                Completion(
                    prompt=one.prompt,
                    messages=(Message("assistant", words),),
                    source=Source(
                        "model",
                        policy.name,
                        revision,
                        canonical(how | {"continues": start}),
                        seed,
                        None,
                        seen[start] + k,
                    ),
                    token_ids=ids,
                    prompt_token_ids=asked,
                    old_logps=None if known is None else known + sampled.logps,
                    finished=sampled.finished,
                )
            )
        seen[start] += n
        found.append(CompletionGroup(one.prompt, tuple(completions)))
    return found


__all__ = ["continuations"]
