"""Completions with exact log-probs: continuous batching on a static key-value cache, one prompt prefill for all of its
completions.

A prompt but for its last token is prefilled once and copied into the slot of each of its n completions; every sampled
token, the first too, then comes from the same decode step. A slot that finishes is given to the next sample in the
queue at once, or dropped from the batch, so nothing is computed for a completion that has ended. Random numbers are
keyed by (seed, sample, position): a completion depends neither on the slots nor on the order of admission, but for the
rounding of its log-probs, as a matrix library adds in another order for another number of rows. The cache lives only
during `generate`: weights that training changes are seen by the next call, and nothing stale can be.

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
from minirl.errors import InputError
from minirl.kernels import Draw, Floor, sample_tokens
from minirl.kernels.truncation import row_parts
from minirl.model import Transformer

COLDEST = 1e-6  # least temperature above 0: a logit divided by less may overflow
PREFILL_TOKENS = 512  # prompts are prefilled in batches of about this many tokens


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions."""

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
    """Together with the sample's number and the position this determines every draw."""

    def __post_init__(self):
        def whole(x, least: float = -math.inf) -> bool:
            return isinstance(x, Integral) and x >= least

        def real(x) -> bool:
            return isinstance(x, Real)

        def several(x) -> bool:
            return isinstance(x, Iterable) and not isinstance(x, str)

        limits = {
            "n": (whole(self.n, 1), "a whole number from 1"),
            "temperature": (
                real(self.temperature) and (self.temperature == 0 or COLDEST <= self.temperature < math.inf),
                f"0, which takes the most likely token, or a finite number from {COLDEST:g}",
            ),
            "top_k": (whole(self.top_k, 0), "a whole number from 0"),
            "top_p": (real(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (real(self.min_p) and 0 <= self.min_p <= 1, "from 0 to 1"),
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
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass
class Completion:
    """One sampled answer. `tokens` include the stop token; `logprobs` are fp32 under the distribution that each was
    drawn from."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    kept: list[np.ndarray] | None = None
    """With truncated sampling: the token ids that could be drawn, int32, one array a token."""
    thinking: bool = False
    """Whether its prompt ends in thoughts, which the completion goes on with."""


@dataclass
class _Prefilled:
    """Keys and values of a prompt but for its last token, waiting for the rest of its samples."""

    kv: list
    start: int
    length: int
    waiting: int


class Sampler:
    """Draws completions from a model with at most `slots` at a time, prompt and completion together at most
    `max_length` tokens."""

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
        """Completions of each prompt, in order. `progress(done, total)` is called as they finish.

        `order` is the order of admission of the samples (sample i·n + j is completion j of prompt i); it changes no
        completion.
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
        """InputError for what `generate` would refuse."""
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
    """The state of one `generate` call. Slots 0 .. len(active)-1 of the cache are in use; `active` maps them to
    samples."""

    def __init__(self, sampler: Sampler, prompts, params: SamplingParams, order: Sequence[int] | None):
        self.model, self.tokenizer, self.prompts, self.params = sampler.model, sampler.tokenizer, prompts, params
        total = len(prompts) * params.n
        self.completions = [Completion(kept=[] if params.truncates else None) for _ in range(total)]
        self.queue = deque(range(total) if order is None else order)
        self.active: list[int] = []
        self.prefilled: dict[int, _Prefilled] = {}
        self.stop_ids = frozenset(params.stop_ids)
        # Each token that shows puts one byte at least into a stop text; a few more cover tokens that do not show.
        self.stop_tail = max((len(text.encode()) for text in params.stop), default=0) + 8
        longest = max((len(p) for p in prompts), default=0)
        self.max_length = min(sampler.max_length, longest + params.max_tokens)
        c = self.model.config
        self.slots = min(sampler.slots, max(total, 1))
        self.cache = Slots(
            c.layers, self.slots, c.kv_heads, self.max_length, c.head_dim, self.model.dtype, self.model.device
        )

    def admit(self) -> None:
        """Give every free slot to the next sample in the queue."""
        count = min(self.slots - len(self.active), len(self.queue))
        if not count:
            return
        samples = [self.queue.popleft() for _ in range(count)]
        self._prefill([s // self.params.n for s in samples])
        by_prompt: dict[int, list[int]] = {}
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
        """Prefill the prompts that are needed now and, where they do not fill a batch, those that come next."""
        needed = [p for p in dict.fromkeys(needed) if p not in self.prefilled]
        while needed:
            batch: dict[int, None] = {}  # an ordered set
            tokens = 0
            for prompt in chain(needed, (s // self.params.n for s in self.queue)):
                if batch and tokens + len(self.prompts[prompt]) > PREFILL_TOKENS:
                    break
                if prompt not in self.prefilled and prompt not in batch:
                    batch[prompt] = None
                    tokens += len(self.prompts[prompt])
            layout = Packed([(self.prompts[p][:-1], []) for p in batch], self.model.device, keep_kv=True)
            if len(layout.tokens):
                self.model(layout.tokens, layout)
            for prompt, (start, length) in zip(batch, layout.prompt_spans, strict=True):
                self.prefilled[prompt] = _Prefilled(layout.kv, start, length, self.params.n)
            needed = [p for p in needed if p not in self.prefilled]

    def step(self) -> int:
        """One token for every active slot; returns how many completions it finished."""
        device = self.model.device
        last, position, drawn = [], [], []
        for sample in self.active:
            prompt, tokens = self.prompts[sample // self.params.n], self.completions[sample].tokens
            last.append(tokens[-1] if tokens else prompt[-1])
            position.append(len(prompt) - 1 + len(tokens))
            drawn.append(len(tokens))
        state = torch.tensor([last, position, self.active, drawn], dtype=torch.long, device=device)
        hidden = self.model(state[0], self.cache.step(state[1], max(position)))
        logits = self.model.logits(hidden)
        p = self.params
        draw = sample_tokens(
            logits,
            p.seed,
            sample=state[2],
            position=state[3],
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            active=self.model.active_vocab,
            entropy=False,
        )
        self._record(draw, logits)
        return self._retire(position)

    def _record(self, draw: Draw, logits: torch.Tensor) -> None:
        kept = None if draw.floor is None else _kept_ids(logits[:, : self.model.active_vocab], draw.floor)
        for slot, (sample, token, logp) in enumerate(
            zip(self.active, draw.token.tolist(), draw.logp.tolist(), strict=True)
        ):
            if logp != logp:
                prompt = sample // self.params.n
                raise InputError(f"the model's logits are NaN for prompt {prompt}: its weights are broken or overflow")
            completion = self.completions[sample]
            completion.tokens.append(token)
            completion.logprobs.append(logp)
            if kept is not None:
                completion.kept.append(kept[slot])

    def _retire(self, position: list[int]) -> int:
        """Close finished completions and fill their slots from the end, so that the active slots stay a prefix of the
        cache."""
        finished = 0
        for slot in reversed(range(len(self.active))):
            reason = self._finish_reason(self.completions[self.active[slot]], position[slot])
            if not reason:
                continue
            self.completions[self.active[slot]].finish_reason = reason
            finished += 1
            end = len(self.active) - 1
            if slot < end:
                self.cache.move(end, slot, position[end] + 1)
                self.active[slot], position[slot] = self.active[end], position[end]
            self.active.pop()
        return finished

    def _finish_reason(self, completion: Completion, position: int) -> str:
        p = self.params
        if completion.tokens[-1] in self.stop_ids:
            return "stop"
        if p.stop:
            tail = self.tokenizer.decode(completion.tokens[-self.stop_tail :], skip_special_tokens=False)
            if any(text in tail for text in p.stop):
                return "stop"
        if len(completion.tokens) == p.max_tokens or position + 2 >= self.max_length:
            return "length"
        return ""


def _kept_ids(logits: torch.Tensor, floor: Floor) -> list[np.ndarray]:
    """The ids of each row's logits [B, V] that are kept, int32."""
    if logits.is_cuda:  # one transfer for all rows, of ids, which are fewer than logits
        row, ids = floor.mask(logits).nonzero().cpu().numpy().T
        return np.split(ids.astype(np.int32), np.bincount(row, minlength=len(logits)).cumsum()[:-1])
    masks = (floor.rows(part).mask(logits[part]).bool().numpy() for part in row_parts(logits))
    return [np.flatnonzero(row).astype(np.int32) for mask in masks for row in mask]
