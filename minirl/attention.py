"""Who may look at whom: the layouts that one forward runs on.

The transformer works on a flat axis of N tokens without padding; only attention needs to know which tokens belong
together. A layout is an object with `positions` [N] and `attend(layer, q, k, v, window)`, and there are two:

- `Packed`: prompts, each with any number of responses that share it (a tree). Rows without responses are plain causal
  rows, so prefill, scoring and training all run on it. A group of G responses costs P + G·R tokens instead of G·(P +
  R).
- `Slots`: one new token for each of B slots of a static key-value cache (decoding).

Left out on purpose: paging (a slot is a slab of `max_length` positions) and padding in anything but the attention call
itself.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Ids = Sequence[int]


class Packed:
    """Prompts and the responses below them, one after another on the flat axis.

    trees: one (prompt, responses) pair a prompt, token ids. The flat order is prompt, response, response, ..., next
    prompt, ... A response token sees the whole prompt and its own past. `keep_kv` stores every layer's keys and values
    (prefill).
    """

    def __init__(self, trees: Sequence[tuple[Ids, Sequence[Ids]]], device=None, keep_kv: bool = False):
        tokens, positions = [], []
        self.prompt_spans: list[tuple[int, int]] = []  # (start, length) on the flat axis
        self.response_spans: list[tuple[int, int, int]] = []  # (start, length, index of its prompt)
        for tree, (prompt, responses) in enumerate(trees):
            self.prompt_spans.append((len(tokens), len(prompt)))
            tokens += prompt
            positions += range(len(prompt))
            for response in responses:
                self.response_spans.append((len(tokens), len(response), tree))
                tokens += response
                positions += range(len(prompt), len(prompt) + len(response))
        self.tokens = torch.tensor(tokens, dtype=torch.long, device=device)  # [N]
        self.positions = torch.tensor(positions, dtype=torch.long, device=device)  # [N]
        self.kv: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if keep_kv else None
        self._masks: dict = {}
        self._index(device)

    def _index(self, device) -> None:
        """Gather indices from the flat axis to padded [rows, time], and back. Padding points at token 0 and is never
        read back."""

        def ranges(spans, width):
            start = torch.tensor([s for s, *_ in spans], dtype=torch.long).unsqueeze(1)
            length = torch.tensor([n for _, n, *_ in spans], dtype=torch.long).unsqueeze(1)
            time = torch.arange(width).unsqueeze(0)
            valid = time < length
            return torch.where(valid, start + time, 0), valid

        prompts, responses = self.prompt_spans, self.response_spans
        self.prompt_width = max((n for _, n in prompts), default=0)
        self.response_width = max((n for _, n, _ in responses), default=0)
        prompt_index, prompt_valid = ranges(prompts, self.prompt_width)  # [S, P]
        response_index, response_valid = ranges(responses, self.response_width)  # [R, T]
        parent = torch.tensor([tree for *_, tree in responses], dtype=torch.long)
        self.prompt_index = prompt_index.to(device)
        self.response_index = response_index.to(device)
        self.key_index = torch.cat([prompt_index[parent], response_index], 1).to(device)  # [R, P + T]
        self.key_valid = torch.cat([prompt_valid[parent], response_valid], 1).to(device)
        key_position = torch.cat([torch.arange(self.prompt_width).expand(len(responses), -1), self._own(parent)], 1)
        self.key_position = key_position.to(device)
        flat = torch.empty(
            len(self.tokens), dtype=torch.long
        )  # flat token -> its place in [prompts ‖ responses], padded
        flat[prompt_index[prompt_valid]] = prompt_valid.flatten().nonzero().squeeze(1)
        flat[response_index[response_valid]] = prompt_valid.numel() + response_valid.flatten().nonzero().squeeze(1)
        self.unpad_index = flat.to(device)

    def _own(self, parent: torch.Tensor) -> torch.Tensor:
        """Positions of the response tokens, [R, T]: they go on where their prompt ends."""
        lengths = torch.tensor([n for _, n in self.prompt_spans], dtype=torch.long)
        return lengths[parent].unsqueeze(1) + torch.arange(self.response_width)

    def _mask(self, kind: str, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [rows, 1, queries, keys]; made once for each (kind, window) of a forward."""
        if (kind, window) not in self._masks:
            if kind == "prompt":
                key = query = torch.arange(self.prompt_width, device=self.tokens.device).unsqueeze(0)
                valid = torch.ones_like(key, dtype=torch.bool)
            else:
                key, valid = self.key_position, self.key_valid
                query = key[:, self.prompt_width :]
            distance = query.unsqueeze(2) - key.unsqueeze(1)  # [rows, queries, keys]
            seen = (distance >= 0) & valid.unsqueeze(1)
            if window is not None:
                seen &= distance < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            # A padded query may see nothing at all: let it see everything, so that no NaN is made where nobody reads.
            mask.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
            self._masks[kind, window] = mask.unsqueeze(1)
        return self._masks[kind, window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """q [N, H, Dh], k and v [N, K, Dh] -> [N, H, Dh]; causal, grouped-query."""
        if self.kv is not None:
            self.kv.append((k, v))
        dtype = q.dtype
        if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()  # there the backward of bf16 attention is several times slower
        windowed = window is not None and window < self.prompt_width
        mask = self._mask("prompt", window, q.dtype) if windowed else None
        index = self.prompt_index
        out = [_attention(q[index], k[index], v[index], mask)] if self.prompt_width else []
        if self.response_width:
            mask = self._mask("response", window, q.dtype)
            keys = self.key_index
            out.append(_attention(q[self.response_index], k[keys], v[keys], mask))
        return torch.cat([o.flatten(0, 1) for o in out]).index_select(0, self.unpad_index).to(dtype)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[rows, time, heads, Dh] each; no mask means causal from the upper left."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


class Slots:
    """A static key-value cache of `slots` rows by `max_length` positions, and the layout of one decode step on it.

    Rows 0 .. B-1 are the active ones; a finished row is replaced (`put`) or filled from the last one (`move`), so that
    a step never computes anything for a completion that has ended.
    """

    def __init__(self, layers: int, slots: int, kv_heads: int, max_length: int, head_dim: int, dtype, device):
        shape = (layers, 2, slots, kv_heads, max_length, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(slots, device=device)

    def put(
        self, slots: Sequence[int], kv: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, length: int
    ) -> None:
        """Copy a prefilled prompt, tokens start .. start+length of a `Packed` forward, to the head of some slots."""
        if not length:
            return
        rows = self.rows[list(slots)]
        for layer, pair in enumerate(kv):
            for i, x in enumerate(pair):  # [N, K, Dh]
                self.kv[layer, i, rows, :, :length] = x[start : start + length].transpose(0, 1)

    def move(self, source: int, target: int, length: int) -> None:
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def step(self, positions: torch.Tensor, longest: int) -> "Slots":
        """Lay out one step: `positions` [B] of the new tokens, `longest` = the largest of them (known to the host)."""
        self.positions = positions
        self.width = min(
            -(-(longest + 1) // 32) * 32, self.kv.shape[4]
        )  # few distinct shapes, and no read beyond what is used
        self._masks: dict = {}
        return self

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._masks:
            distance = self.positions.unsqueeze(1) - torch.arange(self.width, device=self.positions.device)  # [B, T]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """q [B, H, Dh], k and v [B, K, Dh] of one new token a slot -> [B, H, Dh]."""
        B, H, Dh = q.shape
        rows = self.rows[:B]
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys[rows, :, self.positions] = k
        values[rows, :, self.positions] = v
        # The H/K queries that share a key head stand in the place of time, so grouped heads cost no copy of the cache.
        q = q.view(B, k.shape[1], H // k.shape[1], Dh)
        keys, values = keys[:B, :, : self.width], values[:B, :, : self.width]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(window, q.dtype))
        return out.view(B, H, Dh)
