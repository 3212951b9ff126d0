"""See before you train: one example as the model reads it, and whether the disk holds the checkpoints."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from minirl.errors import InputError
from minirl.tokenizer import Tokenizer
from minirl.train.batch import Row
from minirl.train.optimizer import state_bytes
from minirl.train.run import Display, Part, Run

SHOWN = 2000  # characters of a part of an example; more is cut in its middle


def marked(tokenizer: Tokenizer, tokens: Sequence[int], trained: Sequence[bool]) -> list[Part]:
    """The text of some tokens, special ones too, in parts whose tokens are all trained, or all not."""
    parts, end, text = [], 0, ""
    for is_trained, group in groupby(trained):
        end += len(list(group))
        longer = tokenizer.decode(tokens[:end], skip_special_tokens=False)  # a token alone may lose its space
        parts.append((_shortened(longer[len(text) :]), is_trained))
        text = longer
    return parts


def marked_row(tokenizer: Tokenizer, row: Row, learned: Sequence[bool] | None = None) -> list[Part]:
    """A prompt and its response, of whose tokens all are learned, or those that `learned` names."""
    learned = [True] * len(row.response) if learned is None else list(learned)
    return marked(tokenizer, [*row.prompt, *row.response], [False] * len(row.prompt) + learned)


def marked_prompt(tokenizer: Tokenizer, prompt: Sequence[int], max_tokens: int) -> list[Part]:
    """A prompt that has yet to be completed."""
    return [*marked(tokenizer, prompt, [False] * len(prompt)), (f"a completion of up to {max_tokens} tokens", True)]


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


def disk_of(
    run: Run, saved: Iterable[nn.Module], steps: int, save_every: int, finished: Iterable[nn.Module] | None = None
) -> Disk:
    """Add up what a run writes: checkpoints with the `saved` models, and what AdamW keeps of those that are trained;
    in the end the `finished` ones, None: the same."""
    saved = list(saved)
    place = next(folder for folder in (run.out, *run.out.absolute().parents) if folder.exists())
    own = sum(file.stat().st_size for file in (run.out / "checkpoints").rglob("*") if file.is_file())
    copies = max(1, min(-(-steps // save_every), run.keep + 1))
    checkpoint = _bytes(saved) + sum(map(state_bytes, saved))
    last = _bytes(saved if finished is None else finished)
    return Disk(str(place), checkpoint, last, copies, shutil.disk_usage(place).free + own)


def show_disk(disk: Disk, display: Display, always: bool = False) -> None:
    """Say where the disk will be too small, or `always`, and stop where it cannot hold one checkpoint beside the
    model."""
    if disk.free < disk.checkpoint + disk.model:
        raise InputError(f"{disk}: not enough for one checkpoint: free some space, or choose another --out")
    if disk.free < disk.needed:
        display.line(f"{disk}: not enough for all of them in the end: free some space, or raise save_every")
    elif always:
        display.line(str(disk))


def _bytes(models: Iterable[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
