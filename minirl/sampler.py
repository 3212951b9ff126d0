"""Completions with exact log-probs: continuous batching on a static key-value cache, one prompt prefill for all of its
completions.

All tokens of a prompt except the last are prefilled once and copied into the slot of each of its n completions; every
sampled token, the first one included, then comes from the same decode step. A slot whose completion ends is given to
the next sample in the queue at once, or dropped from the batch, so nothing is computed for a completion that has ended.
Random numbers are keyed by (seed, sample, index of the token in its completion), so a completion depends neither on the
number of slots nor on the order of admission. Only its log-probs may differ by rounding, because a matrix library adds
in another order for another number of rows. The cache exists only during `generate`: the next call sees the weights
that training has changed, and no key or value is ever stale.

Left out on purpose: prefix sharing inside the decode step (the copy costs less than gathering in PyTorch), speculative
decoding, paging.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral, Real

import numpy as np
import torch

from minirl.attention import Packed, Slots
from minirl.errors import InputError, NonFinite
from minirl.kernels import Draw, Floor, sample_tokens
from minirl.kernels.truncation import row_parts
from minirl.model import Transformer

COLDEST = 1e-6  # least temperature above 0: a logit divided by less may overflow
PREFILL_TOKENS = 512  # prompts are prefilled in batches of about this many tokens: enough for fast matrix products


@dataclass(frozen=True)
class SamplingParams:
    """Options of sampling: how many completions, from which distribution, and what ends them."""

    n: int = 1
    """Completions for each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens, of equally likely ones those of smaller ids; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this mass; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the largest probability; 0 keeps all."""
    max_tokens: int = 256
    """Longest completion, in tokens."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a completion; the stop token belongs to it."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; needs a sampler with a tokenizer. The tokens keep them, `Rollout.texts` end before
    them: a reward that looks for `</answer>` must not have it as a stop text."""
    seed: int = 0
    """Determines every draw, together with the sample's number and the token's index in its completion."""

    def __post_init__(self):
        def whole(x, least: float = -math.inf) -> bool:
            return isinstance(x, Integral) and x >= least

        def several(x) -> bool:
            return isinstance(x, Iterable) and not isinstance(x, str)

        limits = {
            "n": (whole(self.n, 1), "a whole number from 1"),
            "temperature": (
                isinstance(t := self.temperature, Real) and (t == 0 or COLDEST <= t < math.inf),
                f"0, which takes the most likely token, or a finite number from {COLDEST:g}",
            ),
            "top_k": (whole(self.top_k, 0), "a whole number from 0"),
            "top_p": (isinstance(self.top_p, Real) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (isinstance(self.min_p, Real) and 0 <= self.min_p <= 1, "from 0 to 1"),
            "max_tokens": (whole(self.max_tokens, 1), "a whole number from 1"),
            "stop_ids": (several(self.stop_ids) and all(whole(i, 0) for i in self.stop_ids), "token ids"),
            "stop": (several(self.stop) and all(isinstance(t, str) and t for t in self.stop), "texts, none empty"),
            "seed": (whole(self.seed), "a whole number"),
        }
        for name, (holds, wanted) in limits.items():
            if not holds:
                raise InputError(f"sampling option {name} = {getattr(self, name)!r:.80}: it must be {wanted}")

    @property
    def truncates(self) -> bool:
        """Tell whether some tokens cannot be drawn, so that a completion must keep the ids of those that could."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass
class Completion:
    """One sampled answer. `tokens` include the stop token; `logprobs` are in nats, under the distribution that each
    token was drawn from (temperature and truncation included)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    kept: list[np.ndarray] | None = None
    """With truncated sampling: the token ids that could be drawn, int32, one array a token."""
    thinking: bool = False
    """The prompt ends inside <think>, so the completion begins with thoughts."""


@dataclass
class _Prefilled:
    """Keys and values of a prompt without its last token, kept until all of its samples have a slot."""

    kv: list  # one (keys, values) pair a layer, of all prompts that were prefilled together
    start: int  # first token of this prompt among them
    length: int
    waiting: int  # samples without a slot


class Sampler:
    """Draw completions from a model, at most `slots` of them at a time. A prompt and its completion together have at
    most `max_length` tokens (default: the model's context)."""

    def __init__(self, model: Transformer, slots: int = 64, max_length: int | None = None, tokenizer=None):
        if slots < 1:
            raise InputError(f"slots = {slots}: a sampler needs at least one")
        if max_length is not None and max_length < 2:
            raise InputError(f"max_length = {max_length}: a prompt and a completion of one token each need 2")
        self.model, self.slots, self.tokenizer = model, slots, tokenizer
        self.max_length = min(max_length or model.config.max_positions, model.config.max_positions)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
        order: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Return the n completions of each prompt, in order. `progress(done, total)` is called after every step.

        Sample i·n + j is completion j of prompt i. `order` lists all samples in the order in which they get a slot; it
        changes no completion. InputError for what `check` refuses, and for logits that are NaN.
        """
        self.check(prompts, params, order)
        run = _Generation(self, prompts, params, order)
        done, total = 0, len(prompts) * params.n
        while done < total:
            run.admit()
            done += run.step()
            if progress:
                progress(done, total)
        return [run.completions[i * params.n : (i + 1) * params.n] for i in range(len(prompts))]

    def check(self, prompts, params: SamplingParams, order: Sequence[int] | None = None) -> None:
        """Raise an InputError for prompts and parameters that `generate` cannot use."""
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer: Sampler(model, tokenizer=...)")
        if order is not None and sorted(order) != list(range(len(prompts) * params.n)):
            raise InputError(f"order must hold each of the {len(prompts) * params.n} samples once")
        vocab = self.model.active_vocab
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompt {i} is empty: give at least one token")
            if len(prompt) >= self.max_length:
                raise InputError(
                    f"prompt {i} has {len(prompt)} tokens and the context holds {self.max_length}: shorten the prompt"
                )
            if min(prompt) < 0 or max(prompt) >= vocab:
                raise InputError(
                    f"prompt {i} holds a token outside the vocabulary of {vocab}: is this the model's tokenizer?"
                )


class _Generation:
    """The state of one `generate` call. Slots 0 .. len(active)-1 of the cache are in use; `active[slot]` is the sample
    that a slot works on."""

    def __init__(self, sampler: Sampler, prompts, params: SamplingParams, order: Sequence[int] | None):
        self.model, self.tokenizer, self.prompts, self.params = sampler.model, sampler.tokenizer, prompts, params
        total = len(prompts) * params.n
        self.completions = [Completion(kept=[] if params.truncates else None) for _ in range(total)]
        self.queue = deque(range(total) if order is None else order)
        self.active: list[int] = []
        self.prefilled: dict[int, _Prefilled] = {}
        self.stop_ids = frozenset(params.stop_ids)
        # Only the last tokens can complete a stop text: each visible token has at least one byte, and 8 more tokens
        # leave room for those that decode to nothing.
        self.stop_tail = max((len(text.encode()) for text in params.stop), default=0) + 8
        longest = max((len(p) for p in prompts), default=0)
        # The cache is allocated as long as this call can need, not as long as the model's context.
        self.max_length = min(sampler.max_length, longest + params.max_tokens)
        c = self.model.config
        self.slots = min(sampler.slots, max(total, 1))
        self.cache = Slots(
            c.layers, self.slots, c.kv_heads, self.max_length, c.head_dim, self.model.dtype, self.model.device
        )

    def admit(self) -> None:
        """Give every free slot to the next sample in the queue."""
        count = min(self.slots - len(self.active), len(self.queue))
        samples = [self.queue.popleft() for _ in range(count)]
        self._prefill([s // self.params.n for s in samples])
        by_prompt: dict[int, list[int]] = {}  # prompt -> slots: one copy fills all slots that share a prompt
        for sample in samples:
            by_prompt.setdefault(sample // self.params.n, []).append(len(self.active))
            self.active.append(sample)
        for prompt, slots in by_prompt.items():
            entry = self.prefilled[prompt]
            self.cache.put(slots, entry.kv, entry.start, entry.length)
            entry.waiting -= len(slots)
            if not entry.waiting:
                del self.prefilled[prompt]

    def _prefill(self, needed: list[int]) -> None:
        """Prefill the prompts that are needed now. A batch that they do not fill takes the next ones of the queue, as
        small forwards waste most of the hardware."""
        # PREFILL_TOKENS may hold only some of them.
        while needed := [p for p in dict.fromkeys(needed) if p not in self.prefilled]:
            batch: dict[int, None] = {}  # an ordered set
            tokens = 0
            for prompt in chain(needed, (s // self.params.n for s in self.queue)):
                # The first prompt goes in however long it is: otherwise it would never be prefilled.
                if batch and tokens + len(self.prompts[prompt]) > PREFILL_TOKENS:
                    break
                if prompt not in self.prefilled and prompt not in batch:
                    batch[prompt] = None
                    tokens += len(self.prompts[prompt])
            # The last token is left to the first decode step, whose output is the first sampled token.
            layout = Packed([(self.prompts[p][:-1], []) for p in batch], self.model.device, keep_kv=True)
            if len(layout.tokens):  # all prompts of one token leave nothing to prefill
                self.model(layout.tokens, layout)
            for prompt, (start, length) in zip(batch, layout.prompt_spans, strict=True):
                self.prefilled[prompt] = _Prefilled(layout.kv, start, length, self.params.n)

    def step(self) -> int:
        """Draw one token for every active slot; return how many completions it finished."""
        p, last, position, index = self.params, [], [], []
        for sample in self.active:
            prompt, tokens = self.prompts[sample // p.n], self.completions[sample].tokens
            last.append(tokens[-1] if tokens else prompt[-1])
            position.append(len(prompt) - 1 + len(tokens))
            index.append(len(tokens))  # keys the draw: counted from the completion's start, whatever the prompt
        # One transfer to the device for all four.
        state = torch.tensor([last, position, self.active, index], dtype=torch.long, device=self.model.device)
        logits = self.model.logits(self.model(state[0], self.cache.step(state[1], max(position))))
        cut = {"temperature": p.temperature, "top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p}
        # Nothing reads the entropy here, and it is up to half of a draw's work on a CPU.
        draw = sample_tokens(logits, p.seed, *state[2:], **cut, active=self.model.active_vocab, entropy=False)
        self._record(draw, logits)
        return self._retire(position)

    def _record(self, draw: Draw, logits: torch.Tensor) -> None:
        """Append what was drawn to the completions; InputError for a row whose log-prob is NaN."""
        kept = None if draw.floor is None else _kept_ids(logits[:, : self.model.active_vocab], draw.floor)
        # Waits for the device: once a step, not once a slot.
        tokens, logprobs = draw.token.tolist(), draw.logp.tolist()
        for slot, sample in enumerate(self.active):
            if math.isnan(logprobs[slot]):
                prompt = sample // self.params.n
                raise NonFinite(f"the model's logits are NaN for prompt {prompt}: its weights are broken or overflow")
            completion = self.completions[sample]
            completion.tokens.append(tokens[slot])
            completion.logprobs.append(logprobs[slot])
            if kept is not None:
                completion.kept.append(kept[slot])

    def _retire(self, position: list[int]) -> int:
        """Close finished completions and return their number. The last active slot moves into each gap, so that the
        active slots stay the first ones of the cache."""
        before = len(self.active)
        for slot in reversed(range(before)):  # backwards: the slot that moves has been looked at already
            completion = self.completions[self.active[slot]]
            completion.finish_reason = self._finish_reason(completion, position[slot])
            if completion.finish_reason:
                # Attention reads slots 0 .. B-1 as one slice: a gap would be computed for nothing.
                end = len(self.active) - 1
                if slot < end:
                    # The token that was just drawn has no key yet: the next step stores it.
                    self.cache.move(end, slot, position[end] + 1)
                    self.active[slot], position[slot] = self.active[end], position[end]
                self.active.pop()
        return before - len(self.active)

    def _finish_reason(self, completion: Completion, position: int) -> str:
        """Return "stop", "length", or "" while a completion goes on; `position` is that of the token before
        the last one."""
        p = self.params
        if completion.tokens[-1] in self.stop_ids:
            return "stop"
        if p.stop:
            tail = self.tokenizer.decode(completion.tokens[-self.stop_tail :], skip_special_tokens=False)
            if any(text in tail for text in p.stop):
                return "stop"
        # The last token is at position + 1, so prompt and completion together have position + 2 tokens.
        if len(completion.tokens) == p.max_tokens or position + 2 >= self.max_length:
            return "length"
        return ""


def _kept_ids(logits: torch.Tensor, floor: Floor) -> list[np.ndarray]:
    """Return the ids at or above the floor in each row of logits [B, V], int32."""
    if logits.is_cuda:  # one transfer for all rows, of ids, which are fewer than logits
        row, ids = floor.mask(logits).nonzero().cpu().numpy().T
        return np.split(ids.astype(np.int32), np.bincount(row, minlength=len(logits)).cumsum()[:-1])
    masks = (floor.rows(part).mask(logits[part]).bool().numpy() for part in row_parts(logits))
    return [np.flatnonzero(row).astype(np.int32) for mask in masks for row in mask]
