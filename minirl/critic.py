"""The critic of PPO: V(s_t), the return to expect from the state before token t, and how it is trained.

It is a Transformer of its own with a scalar head, started from the policy's checkpoint, or only a head on the policy's
trunk. Either head starts at zero, so that the first advantages are the returns themselves.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minirl.batch import Batch
from minirl.errors import InputError
from minirl.loss_metrics import combine_metrics
from minirl.losses import Totals, value_loss
from minirl.model import Transformer
from minirl.optimizer import AdamW
from minirl.policy import OPTIMIZER, restore_optimizer
from minirl.run import Run
from minirl.trees import MicroBatch, Row, micro_batches

HEAD = "head.safetensors"


class Critic:
    """A trunk and a head [1, D] on it; with `own` the trunk is the critic's to train, else it is the policy's."""

    FOLDER = "critic"

    def __init__(self, policy: Transformer, config, run: Run, longest: int):
        """Start from the run's checkpoint, config.critic_from or config.model, or as a head on the policy's trunk.

        config: critic, critic_from, value_clip (a value moves by so much from what it was before the update at most),
        value_coef (the weight of the loss where it shares a gradient with the policy's), weight_decay. `longest` is how
        many tokens a prompt with its completion may have.
        """
        self.own, self.clip = config.critic == "own", config.value_clip
        self.coef = 1.0 if self.own else config.value_coef
        if self.own:
            saved = run.checkpoint / self.FOLDER if run.checkpoint else None
            source = saved or config.critic_from or config.model
            self.trunk = Transformer.from_pretrained(source, policy.dtype, policy.device, scalar_head=True)
            self._refuse_what_does_not_fit(policy, source)
            self._refuse_short(longest, source)
            self.trunk.checkpointing = policy.checkpointing
            self.head = self.trunk.score
        else:
            self.trunk, self.head = policy, nn.Linear(policy.config.width, 1, bias=False, device=policy.device)
            nn.init.zeros_(self.head.weight)
        self.optimizer = AdamW(self.trunk if self.own else self.head, weight_decay=config.weight_decay)

    @property
    def models(self) -> list[nn.Module]:
        return [self.trunk if self.own else self.head]

    def _refuse_what_does_not_fit(self, policy: Transformer, source: str | Path) -> None:
        own, wanted, head = self.trunk.config.vocab_size, policy.config.vocab_size, self.trunk.head
        if own != wanted:
            raise InputError(f"{source} has a vocabulary of {own} and the policy one of {wanted}: they must read alike")
        if head.layers != "linear" or head.kind not in ("value", "pairwise", "pointwise"):
            raise InputError(
                f"{source} has a {head.layers} head of kind {head.kind}: a critic starts from a linear one whose "
                "numbers are rewards, pairwise or pointwise"
            )

    def _refuse_short(self, tokens: int, source: str | Path) -> None:
        """Refuse a trunk that cannot read so many tokens; the policy's can."""
        limit = self.trunk.config.max_positions
        if tokens > limit:
            raise InputError(
                f"{source} was made for {limit} tokens, and the longest prompt with a completion may have {tokens}: "
                "lower --max-tokens, or let the critic start from another model"
            )

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """Give fp32 values [M] of hidden [M, D]; the bias of a reward model's head is subtracted, as in its rewards."""
        bias = self.trunk.head.bias if self.own else 0.0
        return F.linear(hidden.float(), self.head.weight.float()).squeeze(-1) - bias

    @torch.no_grad()
    def values_of_rows(self, rows: Sequence[Row], budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give V(s_t) of every token of the responses, [B, T], 0 where there is none; and V(s_T), read at the place of
        the last token, [B]."""
        # A value is read where the next token is predicted, so a token more is asked for.
        longer = [Row(row.prompt, [*row.response, 0], row.group) for row in rows]
        lengths = torch.tensor([len(row.response) for row in rows], device=self.trunk.device)
        out = torch.zeros(len(rows), int(lengths.max()) + 1, device=self.trunk.device)
        for indices in micro_batches(longer, range(len(rows)), budget):
            micro = MicroBatch([longer[i] for i in indices], self.trunk.device)
            V = micro.unflatten(self.values(micro.hidden(self.trunk)))
            out[torch.tensor(indices, device=out.device), : V.shape[1]] = V
        after = out.gather(1, lengths[:, None])
        return out.scatter(1, lengths[:, None], 0)[:, :-1], after.squeeze(1)

    def loss(self, hidden: torch.Tensor, micro: MicroBatch, part: Batch, totals: Totals):
        """Return the value loss of a micro-batch times `coef`, and its metrics, which are those without it."""
        V = micro.unflatten(self.values(hidden))
        loss, metrics = value_loss(V, part.old_values, part.returns, part.mask, self.clip, totals)
        return self.coef * loss, metrics

    def add_gradient(self, batch: Batch, budget: int) -> dict[str, float] | None:
        """Add the gradient of the value loss over all rows, in micro-batches of `budget` tokens; a trunk that is the
        policy's gets none. None where no token counts."""
        totals, parts = Totals.of(batch.mask), []
        for indices in micro_batches(batch.rows, batch.mask.any(1).nonzero().squeeze(1).tolist(), budget):
            part = batch.select(indices)
            micro = MicroBatch(part.rows, self.trunk.device)
            with torch.set_grad_enabled(self.own):
                hidden = micro.hidden(self.trunk)
            loss, metrics = self.loss(hidden, micro, part, totals)
            loss.backward()
            parts.append(metrics)
        return combine_metrics(parts) | {"trained_tokens": totals.tokens} if parts else None

    def save(self, folder: Path) -> None:
        """Write weights and the optimizer's state into a folder of a checkpoint."""
        folder = folder / self.FOLDER
        folder.mkdir()
        if self.own:
            self.trunk.save_pretrained(folder)
        else:
            save_file({"weight": self.head.weight.detach()}, folder / HEAD)
        save_file(self.optimizer.state_dict(), folder / OPTIMIZER)

    def restore(self, folder: Path, state: dict) -> None:
        """Load the optimizer's state, and the head on a shared trunk; a trunk of its own was loaded from there."""
        file = folder / self.FOLDER / HEAD
        try:
            if not self.own:
                self.head.load_state_dict(load_file(file))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise InputError(f"{file} is truncated or missing ({error}): remove {folder} to resume earlier") from None
        restore_optimizer(self.optimizer, folder / self.FOLDER)
