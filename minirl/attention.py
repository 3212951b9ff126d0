"""Mask attention between tokens that do not belong together: the layouts that one forward runs on.

The transformer works on a flat axis of N tokens; only attention needs to know which of them belong together. A layout
is an object with `positions` [N], `attend(layer, q, k, v, window)` and the flag `tiled`: True makes the forward pad the
axis to whole tiles of rows, so that on a CPU a token gets equal bits whatever shares its batch (kernels/linear.py).
There are two:

- `Packed`: prompts, each with any number of responses that share it (a tree). Prompts without responses are ordinary
  causal sequences, so prefill, log-probs and training all run on it. A group of G responses costs P + G·R tokens
  instead of G·(P + R).
- `Slots`: one new token for each of B slots of a static key-value cache (decoding).

Left out on purpose: paging (a slot is a slab of `max_length` positions) and padding in anything but the attention call
itself and the last tile.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Ids = Sequence[int]


class Packed:
    """Prompts and the responses below them, one after another on the flat axis.

    trees: one (prompt, responses) pair a prompt, token ids. The flat order is prompt, response, response, ..., next
    prompt, ... A response token sees the whole prompt and its own past. `keep_kv` stores the keys and values of every
    layer (prefill).

    A row is one prompt or one response. Its keys are ordered by position: its prompt, then its response, without a gap.
    On a CPU only rows of one padded size share a call of attention: the order of every sum then depends on the row
    alone, and the other rows of the batch change no bit of it.
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
        self.tiled = self.tokens.device.type == "cpu"
        self._index(by_size=self.tiled)

    def _index(self, by_size: bool) -> None:
        """Group the rows into calls of attention, and make the indices that gather their queries and keys from the flat
        axis, and the outputs back. Padding gathers token 0, and its output is never read."""
        # (is a response, start, length, start of its prompt, length of its prompt)
        rows = [(False, start, n, 0, 0) for start, n in self.prompt_spans]
        rows += [(True, start, n, *self.prompt_spans[tree]) for start, n, tree in self.response_spans]
        groups: dict[tuple, list[tuple[int, ...]]] = {}
        for is_response, start, n, prompt, before in rows:
            if n:
                # Prompts need no mask, so they never share a call with responses.
                size = (_padded(n), _padded(n + before)) if by_size else ()
                groups.setdefault((is_response, *size), []).append((start, n, prompt, before))
        self.calls, queries, keys = [], [], []
        offset, device = 0, self.tokens.device
        flat = torch.empty(len(self.tokens), dtype=torch.long)  # flat token -> its place among all padded queries
        for (are_responses, *_), rows in groups.items():
            start, n, prompt, before = torch.tensor(rows).T.unsqueeze(2)  # [R, 1] each
            query = torch.arange(_padded(int(n.max())))
            key = torch.arange(_padded(int((n + before).max())))
            own = torch.where(query < n, start + query, 0)
            seen = torch.where(key < before, prompt + key, torch.where(key < before + n, start + key - before, 0))
            self.calls.append(_Call(len(rows), len(query), len(key), before.to(device) if are_responses else None))
            queries.append(own.flatten())
            keys.append(seen.flatten())
            flat[own[query < n]] = offset + (query < n).flatten().nonzero().squeeze(1)
            offset += own.numel()
        self.unpad_index = flat.to(device)
        self.query_index, self.key_index = (
            torch.cat(parts).to(device) if parts else flat.to(device) for parts in (queries, keys)
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """Attend causally with grouped queries: q [N, H, Dh], k and v [N, K, Dh] -> [N, H, Dh]. Rows of q beyond N fill
        the last tile; their output is never read."""
        if self.kv is not None:
            self.kv.append((k, v))
        dtype, padding = q.dtype, len(q) - len(self.tokens)
        if q.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()  # a CPU's backward of bf16 attention is several times slower
        queries = q.index_select(0, self.query_index).split([call.rows * call.queries for call in self.calls])
        keys, values = (
            x.index_select(0, self.key_index).split([call.rows * call.keys for call in self.calls]) for x in (k, v)
        )
        out = [call(*qkv, window) for call, *qkv in zip(self.calls, queries, keys, values, strict=True)]
        return torch.cat(out).index_select(0, F.pad(self.unpad_index, (0, padding))).to(dtype)


class _Call:
    """One call of attention on R rows of one padded size. `before` [R, 1] holds the length of the prompt before each
    response; None for prompts, which have a query for each key."""

    def __init__(self, rows: int, queries: int, keys: int, before: torch.Tensor | None):
        self.rows, self.queries, self.keys, self.before = rows, queries, keys, before
        self._masks: dict[int | None, torch.Tensor] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """Attend: q [R·queries, H, Dh], k and v [R·keys, K, Dh] -> [R·queries, H, Dh]."""
        q, k, v = (x.unflatten(0, (self.rows, -1)).transpose(1, 2) for x in (q, k, v))
        windowed = window is not None and window < self.keys
        # Without a mask PyTorch may choose its fused causal kernel.
        mask = self._mask(window if windowed else None, q) if windowed or self.before is not None else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def _mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return the additive mask [R or 1, 1, queries, keys], made once for each window of a forward.

        Padded keys lie behind all positions of the row, so causality alone hides them from every query that is read.
        """
        if window not in self._masks:
            key = torch.arange(self.keys, device=like.device)
            before = key[:1, None] if self.before is None else self.before
            # A padded query beyond the last key still sees that key: no NaN is made where nobody reads.
            query = (before + key[: self.queries]).clamp(max=self.keys - 1)
            self._masks[window] = additive_mask(query.unsqueeze(2) - key, window, like.dtype).unsqueeze(1)
        return self._masks[window]


def additive_mask(distance: torch.Tensor, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a query may see a key and −inf elsewhere. `distance` is the query's position less the key's."""
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _padded(n: int) -> int:
    """Round a length up to one of few sizes, so that rows share calls: multiples of 16 up to 128, then four sizes in
    each octave (160, 192, 224, 256, 320, ...)."""
    step = max(16, 1 << max((n - 1).bit_length() - 3, 0))
    return -(-n // step) * step


class Slots:
    """A static key-value cache of `slots` rows by `max_length` positions, and the layout of one decode step on it.

    Rows 0 .. B-1 are the active ones. A row whose completion has ended is overwritten by a new prompt (`put`) or by the
    last active row (`move`), so that a step computes nothing for completions that have ended.
    """

    tiled = False  # padding five slots to a whole tile would cost more than their step

    def __init__(self, layers: int, slots: int, kv_heads: int, max_length: int, head_dim: int, dtype, device):
        shape = (layers, 2, slots, kv_heads, max_length, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(slots, device=device)

    def put(
        self, slots: Sequence[int], kv: Sequence[tuple[torch.Tensor, torch.Tensor]], start: int, length: int
    ) -> None:
        """Copy a prefilled prompt, tokens start .. start+length of a `Packed` forward, to the first positions of some
        slots."""
        if not length:  # a prompt of one token: its keys come from the first decode step
            return
        rows = self.rows[list(slots)]
        for layer, pair in enumerate(kv):
            for i, x in enumerate(pair):  # [N, K, Dh]
                self.kv[layer, i, rows, :, :length] = x[start : start + length].transpose(0, 1)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def step(self, positions: torch.Tensor, longest: int) -> "Slots":
        """Lay out one step for new tokens at `positions` [B]. `longest` is the largest of them as a Python int, since
        reading it from a GPU would wait for all work there."""
        self.positions = positions
        # Read no further than what is used; multiples of 32 keep the number of distinct shapes small.
        self.width = min(-(-(longest + 1) // 32) * 32, self.kv.shape[4])
        self._masks: dict = {}
        return self

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        if window not in self._masks:
            distance = self.positions.unsqueeze(1) - torch.arange(self.width, device=self.positions.device)  # [B, T]
            self._masks[window] = additive_mask(distance, window, dtype)[:, None, None, :]
        return self._masks[window]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        """Store the keys and values of one new token a slot and attend: q [B, H, Dh], k and v [B, K, Dh] ->
        [B, H, Dh]."""
        B, H, Dh = q.shape
        rows = self.rows[:B]
        keys, values = self.kv[layer, 0], self.kv[layer, 1]
        keys[rows, :, self.positions] = k
        values[rows, :, self.positions] = v
        # The H/K queries that share a key head take the place of the time axis: no copy of the cache for each of them.
        q = q.view(B, k.shape[1], H // k.shape[1], Dh)
        keys, values = keys[:B, :, : self.width], values[:B, :, : self.width]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask(window, q.dtype))
        return out.view(B, H, Dh)
