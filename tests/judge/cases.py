"""Read tables of cases from the TOML files beside this one, and call rewards on them."""

import json
import tomllib
from pathlib import Path

from minirl.lab.rewards import REWARDS


def read_cases(name: str) -> dict:
    """Return the tables of `name`.toml."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))


def joined(parts):
    """Join a text that is a list of parts, of which [text, times] is repeated; return anything else as it is."""
    return "".join(p if isinstance(p, str) else p[0] * p[1] for p in parts) if isinstance(parts, list) else parts


def values_of(rule, completions: list[str], **columns) -> list:
    """Call a reward, which may be given by its name, on completions of one row: each column has that row's value."""
    repeated = {name: [value] * len(completions) for name, value in columns.items()}
    return REWARDS.get(rule, rule)(prompts=["p"] * len(completions), completions=completions, **repeated)


def write_rows(path: Path, rows: list) -> Path:
    """Write a file of JSON lines; a row that is a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
