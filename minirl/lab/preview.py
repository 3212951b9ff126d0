"""See before you train: one example as the model reads it, and whether the disk holds the checkpoints."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from minirl.errors import InputError
from minirl.optimizer import state_bytes
from minirl.run import Display, Observer, Run
from minirl.tokenizer import Tokenizer

Part = tuple[str, bool]  # a piece of an example's text, and whether its tokens are trained

SHOWN = 2000  # characters of a part of an example; more is cut in its middle


def marked(tokenizer: Tokenizer, tokens: Sequence[int], trained: Sequence[bool]) -> list[Part]:
    """Return the text of some tokens, special ones too, in parts whose tokens are all trained, or all not."""
    parts, end, text = [], 0, ""
    for is_trained, group in groupby(trained):
        end += len(list(group))
        longer = tokenizer.decode(tokens[:end], skip_special_tokens=False)  # a token alone may lose its space
        parts.append((_shortened(longer[len(text) :]), is_trained))
        text = longer
    return parts


def marked_example(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int] | int, learned: Sequence[bool] | None = None
) -> list[Part]:
    """Return a prompt and its response, of whose tokens all are learned, or those that `learned` names; a number stands
    for a completion of so many tokens at most that has yet to be sampled."""
    if isinstance(response, int):
        wanted = (f"a completion of up to {response} tokens", True)
        return [*marked(tokenizer, prompt, [False] * len(prompt)), wanted]
    learned = [True] * len(response) if learned is None else list(learned)
    return marked(tokenizer, [*prompt, *response], [False] * len(prompt) + learned)


class PlainDisplay(Display):
    """Lines on stdout, for a script."""

    def example(self, tokenizer: Tokenizer, prompt: Sequence[int], response, learned=None) -> None:
        """Show an example with what is trained between brackets."""
        parts = marked_example(tokenizer, prompt, response, learned)
        text = "".join(f"⟦{text}⟧" if trained else text for text, trained in parts)
        self.line(f"one example, what is trained in ⟦ ⟧:\n{text}")


def _shortened(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} … ({len(text) - SHOWN:,} characters) … {text[-half:]}"


# --- disk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """Bytes that a run will write, and those that are free where it writes them."""

    place: str
    checkpoint: int
    model: int
    copies: int  # checkpoints at a time: a new one is whole before the oldest goes
    free: int

    @property
    def needed(self) -> int:
        return self.copies * self.checkpoint + self.model

    def __str__(self) -> str:
        checkpoints = f"{self.copies} checkpoint{'s' * (self.copies > 1)} of {_size(self.checkpoint)}"
        return (
            f"disk: {_size(self.needed)} at most ({checkpoints} and the trained model), {_size(self.free)} are free in "
            f"{self.place}"
        )


def disk_of(run: Run, steps: int, save_every: int) -> Disk:
    """Add up what a run writes: checkpoints of all that it holds, with what AdamW keeps of those models that are
    trained; in the end the policy, and a reward model that has learned."""
    saved = [model for thing in run.held.values() for model in thing.models]
    finished = [model for name in ("policy", "rewards") if name in run.held for model in run.held[name].models]
    place = next(folder for folder in (run.out, *run.out.absolute().parents) if folder.exists())
    own = sum(file.stat().st_size for file in (run.out / "checkpoints").rglob("*") if file.is_file())
    copies = max(1, min(-(-steps // save_every), run.keep + 1))
    checkpoint = _bytes(saved) + sum(map(state_bytes, saved))
    return Disk(str(place), checkpoint, _bytes(finished), copies, shutil.disk_usage(place).free + own)


def show_disk(disk: Disk, display: Display, always: bool = False) -> None:
    """Say where the disk will be too small, or `always`, and stop where it cannot hold one checkpoint beside the
    model."""
    if disk.free < disk.checkpoint + disk.model:
        raise InputError(f"{disk}: not enough for one checkpoint: free some space, or choose another --out")
    if disk.free < disk.needed:
        display.line(f"{disk}: not enough for all of them in the end: free some space, or raise save_every")
    elif always:
        display.line(str(disk))


class ShowExample(Observer):
    """The observer that shows the run's example before its first step."""

    def begin(self, run: Run) -> None:
        if run.start == 0:
            run.display.example(*run.example)


class DiskCheck(Observer):
    """The observer that stops a run whose checkpoints the disk cannot hold, before its first step."""

    def begin(self, run: Run) -> None:
        show_disk(disk_of(run, run.total, run.save_every), run.display)


def _bytes(models: Iterable[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
