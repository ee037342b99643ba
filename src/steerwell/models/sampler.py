"""Draw completions from a policy: exact samples, with their log-probabilities, in few passes.

A prompt is read once for all of its samples, packed with its neighbours. Then every live row takes one token
per forward pass from a static cache. Rows that have finished leave the batch, and waiting prompts join it.
Any causal language model that runs through :mod:`steerwell.models.attention` can be sampled. Models that
cannot share prompts are read as :mod:`steerwell.models.stateful` says; what is drawn follows the same rule.

A sample is a function of the weights, the prompt's tokens, the seed and the sample's index: each draw turns
one uniform number, hashed from seed, prompt, index and step, into a token (inverse of the cumulative
distribution). Batch size and neighbours change nothing but the last digits of floating-point sums. The
numbers come from SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages, as_messages, canonical
from steerwell.data.types import Completion, CompletionGroup, Prompt, Source
from steerwell.models.attention import refuse_other_ways, takes_tree, unwrap, use_steerwell_attention
from steerwell.models.kv_cache import CachePlan
from steerwell.models.render import tokenize_prompts
from steerwell.models.sharding import gathered
from steerwell.models.stateful import run_in_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerwell.models.load import Policy

PREFILL_TOKENS = 8192  # padded prompt tokens per forward pass: bounds the memory of activations
SHORT_PROMPT = 64  # tokens; prompts up to here share a cache whatever their lengths
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sample: tokens (with the stop token, if reached), their log-probs in nats, whether it stopped."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


def sample(
    policy: Policy,
    prompts: Sequence[Prompt | str | Sequence[Message | Mapping[str, Any]]],
    n: int = 1,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[CompletionGroup]:
    """Sample ``n`` completions for every prompt; one group per prompt, in the order given.

    The completions carry ``prompt_token_ids``, ``token_ids`` with the stop token (if it was reached),
    ``old_logps`` (nats, at the sampling temperature) and ``finished``. ``source.index`` counts the samples of
    a prompt, also where the list names a prompt twice, so that no two samples are the same sample.

    The other arguments, and the errors, are those of :func:`generate`.
    """
    messages = [p.messages if isinstance(p, Prompt) else as_messages(p) for p in prompts]
    tokenizer = policy.tokenizer
    prompt_ids = tokenize_prompts(tokenizer, messages)
    samples = generate(
        policy.model,
        prompt_ids,
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
    texts = _texts(tokenizer, samples)
    revision = policy.digest()
    groups: list[CompletionGroup] = []
    seen: Counter[Messages] = Counter()
    for prompt, asked, ids, drawn in zip(prompts, messages, prompt_ids, samples, strict=True):
        completions = tuple(
            Completion(
                prompt=asked,
                messages=(Message("assistant", next(texts)),),
                source=Source("model", policy.name, revision, canonical(how), seed, None, seen[asked] + k),
                token_ids=one.token_ids,
                prompt_token_ids=tuple(ids),
                old_logps=one.logps,
                finished=one.finished,
            )
            for k, one in enumerate(drawn)
        )
        seen[asked] += n
        meta = prompt.meta if isinstance(prompt, Prompt) else {}
        groups.append(CompletionGroup(asked, completions, meta=meta))
    return groups


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    n: int = 1,
    *,
    stop: Sequence[int] = (),
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[list[Sampled]]:
    """Sample ``n`` continuations of every token sequence: P lists of n samples, in the order given.

    A sample ends with the first of the ``stop`` tokens, after ``max_new_tokens``, or where prompt and sample
    fill the model's context (``max_position_embeddings``). Log-probabilities are those of the model at
    ``temperature``; with ``greedy`` the likeliest token is taken and the n samples of a prompt are equal.
    ``batch_size`` rows at most are sampled together; it changes no sample. A prompt is read once for all its
    samples if they fit in a batch. ``progress`` is called with the number of finished samples and of all.

    The model is switched to evaluation and to our attention while this runs, and back however it ends.

    Raises :class:`InputError` for an empty prompt, one that leaves no room in the context, settings out of
    range, a model that does not read from left to right, and logits that are not numbers.
    """
    _check(n, max_new_tokens, temperature, batch_size)
    room = _room(prompts, _context(model), max_new_tokens)
    keys = _row_keys(prompts, n, seed)
    device = next(model.parameters()).device
    draw = _Draw(list(prompts), n, room, keys, sorted(set(stop)), temperature, greedy, device, progress)

    def run() -> None:
        with sampling(model), torch.no_grad():
            if not takes_tree(model):
                run_in_step(model, draw.prompts, n, batch_size, draw.pick)
                return
            for wave in _waves([len(ids) for ids in prompts]):
                _run(model, draw, wave, batch_size)

    gathered(model, run)
    return draw.samples()


@dataclass
class _Draw:
    """One call of :func:`generate`: what is asked and drawn. Row p * n + k is sample k of prompt p."""

    prompts: list[Sequence[int]]
    n: int
    room: np.ndarray  # (P,) most tokens to sample
    keys: np.ndarray  # (P * n,) uint64
    stop: list[int]
    temperature: float
    greedy: bool
    device: torch.device
    progress: Progress | None
    done: int = 0
    history: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def pick(self, logits: Tensor, rows: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next token of each of these rows (R,), which have ``drawn`` tokens; and which rows it ends."""
        uniform = None
        if not self.greedy:
            uniform = torch.from_numpy(_uniforms(self.keys[rows], drawn)).to(self.device)
        token, logp = (x.cpu().numpy() for x in _pick(logits, self.temperature, uniform))
        self.history.append((rows, token, logp))
        over = np.isin(token, self.stop) | (drawn + 1 == self.room[rows // self.n])
        if self.progress is not None and over.any():
            self.done += int(over.sum())
            self.progress(self.done, len(self.prompts) * self.n)
        return token, over

    def samples(self) -> list[list[Sampled]]:
        """All samples, prompt by prompt."""
        if not self.history:
            return [[] for _ in self.prompts]
        rows, tokens, logps = (np.concatenate(column) for column in zip(*self.history, strict=True))
        order = np.argsort(rows, kind="stable")
        cuts = np.cumsum(np.bincount(rows))[:-1]
        parts = (np.split(x[order], cuts) for x in (tokens, logps))
        ends = set(self.stop)
        drawn = [
            Sampled(tuple(ids.tolist()), tuple(lps.tolist()), int(ids[-1]) in ends)
            for ids, lps in zip(*parts, strict=True)
        ]
        return [drawn[i : i + self.n] for i in range(0, len(drawn), self.n)]


def _run(model: nn.Module, draw: _Draw, wave: list[int], batch_size: int) -> None:
    """Sample the prompts of a wave, longest first: finished rows leave, waiting prompts take their places."""
    waiting = deque(
        (p, p * draw.n + k, min(batch_size, draw.n - k)) for p in wave for k in range(0, draw.n, batch_size)
    )  # prompt, its first row, number of rows
    total = len(wave) * draw.n
    capacity = min(batch_size, total)
    longest = max(len(draw.prompts[p]) + int(draw.room[p]) - 1 for p in wave)  # the last token is never read
    plan = CachePlan(capacity, longest if total <= capacity else longest + max(32, longest // 2), draw.device)
    rows = drawn = start = np.zeros(0, dtype=np.int64)
    logits: Tensor | None = None
    while True:
        free = capacity - len(rows)
        if waiting and free >= max(waiting[0][2], capacity // 4):
            admitted: list[tuple[int, int, int]] = []
            while waiting and waiting[0][2] <= free:
                admitted.append(waiting.popleft())
                free -= admitted[-1][2]
            fresh = _read(model, draw, plan, admitted)
            logits = fresh if logits is None else torch.cat([logits, fresh])
            new = np.concatenate([np.arange(first, first + k) for _, first, k in admitted])
            rows, drawn = np.concatenate([rows, new]), np.concatenate([drawn, np.zeros_like(new)])
            start = np.concatenate([start, [len(draw.prompts[row // draw.n]) for row in new]])
        assert logits is not None
        token, over = draw.pick(logits, rows, drawn)
        drawn = drawn + 1
        if over.any():
            live = len(rows) - int(over.sum())
            holes, movers = np.flatnonzero(over[:live]), np.flatnonzero(~over[live:]) + live
            plan.drop(torch.from_numpy(holes).to(draw.device), torch.from_numpy(movers).to(draw.device), live)
            line = np.arange(live)
            line[holes] = movers
            rows, drawn, start, token = rows[line], drawn[line], start[line], token[line]
        if not len(rows):
            if not waiting:
                return
            logits = None
            continue
        plan.step()
        last = torch.from_numpy(token).to(draw.device)[:, None]
        place = torch.from_numpy(start + drawn - 1).to(draw.device)[:, None]
        logits = model(input_ids=last, position_ids=place, use_cache=False, plan=plan).logits[:, -1]


def _read(model: nn.Module, draw: _Draw, plan: CachePlan, admitted: list[tuple[int, int, int]]) -> Tensor:
    """Read new prompts, each once, packed, some thousand tokens per pass; the logits (R, V) of their rows."""
    logits: list[Tensor] = []
    first = 0
    while first < len(admitted):
        width = len(draw.prompts[admitted[first][0]])  # the longest of the rest
        block = admitted[first : first + max(1, PREFILL_TOKENS // width)]
        prompts = [draw.prompts[p] for p, _, _ in block]
        lengths, copies = [len(ids) for ids in prompts], [k for _, _, k in block]
        packed = torch.tensor([token for ids in prompts for token in ids], device=draw.device)
        place = torch.cat([torch.arange(length, device=draw.device) for length in lengths])
        ends = torch.tensor(lengths, device=draw.device).cumsum(0) - 1
        plan.admit(lengths, copies)
        out = model(
            input_ids=packed[None], position_ids=place[None], use_cache=False, plan=plan, logits_to_keep=ends
        )
        kept = out.logits[0] if out.logits.shape[1] == len(block) else out.logits[0, ends]
        logits.append(kept.repeat_interleave(torch.tensor(copies, device=draw.device), 0))
        first += len(block)
    return torch.cat(logits)


def _pick(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability: (R, V) and (R,) numbers in [0, 1] to (R,), (R,).

    The token is the first whose cumulative probability exceeds the number, or the last possible one for a
    number that was rounded to 1; without numbers, the likeliest.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    top, best = logits.max(-1, keepdim=True)
    cumulative = (logits - top).exp_().cumsum(-1)
    mass = cumulative[:, -1:]
    if not bool(torch.isfinite(mass).all()):
        raise InputError(
            "the model gives logits that are not numbers",
            mend="Its weights have diverged; load an earlier checkpoint.",
        )
    if uniform is None:
        token = best
    else:
        goal = torch.minimum(uniform[:, None] * mass, torch.nextafter(mass, torch.zeros_like(mass)))
        token = torch.searchsorted(cumulative, goal, right=True)
    logp = logits.gather(-1, token) - top - mass.log()
    return token[:, 0], logp[:, 0]


def _row_keys(prompts: Sequence[Sequence[int]], n: int, seed: int) -> np.ndarray:
    """(P * n,) 64-bit hashes of seed, prompt and sample index. A repeated prompt goes on counting."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = np.empty(len(prompts) * n, dtype=np.uint64)
    for p, ids in enumerate(prompts):
        prompt = tuple(ids)
        base = hashlib.blake2b(json.dumps([seed, *prompt]).encode(), digest_size=8)
        for k in range(n):
            row = base.copy()
            row.update(b"#%d" % (seen[prompt] + k))
            keys[p * n + k] = int.from_bytes(row.digest(), "little")
        seen[prompt] += n
    return keys


def _uniforms(keys: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(R,) numbers in [0, 1]: number ``drawn`` of the SplitMix64 stream of every key."""
    z = keys + (drawn + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53).astype(np.float32)


def _waves(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Prompts that may share a cache, longest first: all short, or none shorter than half of the longest."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        enough = lengths[order[0]] // 2 if lengths[order[0]] > SHORT_PROMPT else 0
        size = sum(lengths[p] >= enough for p in order)
        yield order[:size]
        order = order[size:]


def _check(n: int, max_new_tokens: int, temperature: float, batch_size: int) -> None:
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 < temperature < float("inf"):
        raise InputError(
            f"temperature must be above 0, got {temperature}", mend="For the likeliest text say greedy=True."
        )


def _context(model: nn.Module) -> int | None:
    """How many positions the model knows; None if its configuration names no limit."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)


def _room(prompts: Sequence[Sequence[int]], context: int | None, max_new_tokens: int) -> np.ndarray:
    """How many tokens each prompt may be given: never more than its context has left."""
    room: list[int] = []
    for number, ids in enumerate(prompts, 1):
        if not len(ids):
            raise InputError(f"prompt {number} has no tokens", mend="Give at least one token.")
        left = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if left < 1:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens, and the model reads {context} including its answer",
                mend="Shorten the prompt, or use a model with a longer context.",
            )
        room.append(left)
    return np.array(room, dtype=np.int64)


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and, if it takes it, with our attention; both are put back in any case."""
    base = unwrap(model)
    training = [module for module in model.modules() if module.training]
    attention = base.config._attn_implementation or "sdpa"
    try:
        refuse_other_ways(base)
        if takes_tree(base):
            use_steerwell_attention(base)
        model.eval()
        yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        for module in training:
            module.training = True


def _texts(tokenizer: PreTrainedTokenizerBase, samples: list[list[Sampled]]) -> Iterator[str]:
    """The words of every sample, without stop and other special tokens."""
    ids = [list(one.token_ids) for drawn in samples for one in drawn]
    return iter(tokenizer.batch_decode(ids, skip_special_tokens=True))


__all__ = ["Sampled", "generate", "sample", "sampling"]
