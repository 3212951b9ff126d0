"""Read and score answers to problems of reasoning-gym.

The package's scorers are made for honest answers. Some execute the answer that they are given; some give full marks for
what is not right: puzzle24 takes any four numbers, number_sorting takes NaN, game_of_life_halting takes any text. So
they run in the pool (`reasoning_worker`), only their full score counts as right, and a guard comes before each: a pure
function that returns False for what can be no right answer. Found by reading every scorer of 0.1.25.
"""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

from minirl.judge.answers import Reward, Vote, text_vote
from minirl.judge.expressions import compute
from minirl.judge.numbers import answer_number, whole_number
from minirl.judge.pool import call_each

WORKER = Path(__file__).resolve().with_name("reasoning_worker.py")
SECONDS = 5.0  # for one answer; the slowest honest one takes half a second


def scorer(dataset: str, options: str, read: Vote) -> Reward:
    """Return a reward: 1 where the answer that `read` finds in a completion gets the data set's full score, else 0.

    `options` is the data set's configuration in JSON. An answer that kills its scorer is wrong; one that takes it
    longer than `SECONDS` is a TimeoutError, which counts as 0.
    """

    def correct(prompts, completions, answer, entry, **columns) -> list[float | Exception]:
        values: list[float | Exception] = [0.0] * len(completions)
        jobs: dict[tuple, list[int]] = {}  # equal answers to one problem are scored once
        for i, (completion, oracle, problem) in enumerate(zip(completions, answer, entry, strict=True)):
            found = read(completion)
            if found is None:
                continue
            if _same_number(found, oracle or "", {}):
                found = oracle  # 7.0 is 7, but the default scorer compares texts
            if may_be_right(dataset, found, json.loads(problem)):
                jobs.setdefault((dataset, options, found, problem), []).append(i)
        outcomes = call_each(f"{WORKER}:score", list(jobs), SECONDS) if jobs else []
        for rows, outcome in zip(jobs.values(), outcomes, strict=True):
            for i in rows:
                values[i] = outcome if isinstance(outcome, TimeoutError) else float(outcome == 1.0)
        return values

    return correct


def reader(oracles: list[str | None]) -> Vote:
    """Return the function that reads a completion's answer: the last number where all oracles are numbers, the whole
    text where one has several lines, else the last line."""
    if all(oracle is not None and whole_number(oracle) is not None for oracle in oracles):
        return last_number
    return text_vote if any("\n" in (oracle or "").strip() for oracle in oracles) else last_line


def last_number(completion: str) -> str | None:
    """Return the completion's number in the notation that scorers read: 1,000 is "1000", 1/2 is "0.5"."""
    value = answer_number(completion)
    if value is None:
        return None
    return str(value) if value.denominator == 1 else repr(float(value))


def last_line(completion: str) -> str | None:
    """Return the last line behind the thoughts that is not empty; None if there is none."""
    text = text_vote(completion)
    return text and text.splitlines()[-1].strip()


# --- guards: a hole in a scorer each ----------------------------------------------------------------------------------

FOREIGN = re.compile(r"""__|["'`;\\]|\b(?:lambda|import|eval|exec|open|nan|inf|infinity)\b""", re.IGNORECASE)
FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "C"}  # in integrals; but no integrate(...) of the question


def may_be_right(name: str, answer: str, entry: dict) -> bool:
    """Return whether the data set's scorer may be asked about this answer to the problem entry {answer, metadata}."""
    oracle = entry["answer"] or ""
    if not answer or len(answer) > 1000 + 4 * len(oracle):
        return False
    if any(c.isdigit() and not c.isascii() for c in answer):
        return False
    if entry["answer"] is not None and not _foreign(answer) <= _foreign(oracle) | {"\\"}:
        return False
    guard = GUARDS.get(name)
    return guard is None or bool(guard(answer, oracle, entry["metadata"]))


def _foreign(text: str) -> set[str]:
    """Return the parts of a text that could be code: an answer may hold those of the oracle alone. The two quotation
    marks count as one."""
    return {match.lower().replace('"', "'") for match in FOREIGN.findall(text)}


def _is_oracle(answer: str, oracle: str, metadata: dict) -> bool:
    return answer.strip() == oracle.strip()


def _same_letters(answer: str, oracle: str, metadata: dict) -> bool:
    return answer.replace(" ", "").casefold() == oracle.replace(" ", "").casefold()


def _same_words(answer: str, oracle: str, metadata: dict) -> bool:
    return answer.casefold().split() == oracle.casefold().split()


def _same_list(answer: str, oracle: str, metadata: dict) -> bool:
    return [word.strip() for word in answer.split(",")] == [word.strip() for word in oracle.split(",")]


def _same_json(answer: str, oracle: str, metadata: dict) -> bool:
    try:
        return json.loads(answer) == json.loads(oracle)
    except (ValueError, RecursionError):
        return False


def _same_number(answer: str, oracle: str, metadata: dict) -> bool:
    return whole_number(answer) is not None and whole_number(answer) == whole_number(oracle)


def _sorted_numbers(answer: str, oracle: str, metadata: dict) -> bool:
    """Compare with a tolerance of 1e-6, as the scorer forgives an error of 1 in every number."""
    try:
        found = [float(number) for number in json.loads(answer.replace("'", '"'))]
        wanted = [float(number) for number in ast.literal_eval(oracle)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    return len(found) == len(wanted) and all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True))


def _uses(target: Callable[[dict], int]) -> Callable[[str, str, dict], bool]:
    """Return a guard that passes an expression with the target's value and each of the numbers exactly once, read by
    minirl's own parser."""

    def guard(answer: str, oracle: str, metadata: dict) -> bool:
        return compute(answer) == (target(metadata), sorted(metadata["numbers"]))

    return guard


def _algebra(answer: str, oracle: str, metadata: dict) -> bool:
    """Pass a formula of the oracle's names and elementary functions: any other name would be looked up in sympy and
    called."""
    names = set(re.findall(r"[^\W\d]+", answer))
    known = FUNCTIONS | set(re.findall(r"[^\W\d]+", oracle))
    called = set(re.findall(r"([^\W\d]+)\s*\(", answer))
    formula = re.fullmatch(r"(?:[\w+\-*/() ]|(?<=\d)\.(?=\d))*", answer)
    return formula is not None and names <= known and called <= FUNCTIONS - {"C"}


def _matches(pattern: str) -> Callable[[str, str, dict], bool]:
    compiled = re.compile(pattern)
    return lambda answer, oracle, metadata: compiled.fullmatch(answer.strip()) is not None


GUARDS: dict[str, Callable[[str, str, dict], bool]] = {
    # their scorers execute the answer, and only the oracle's own text scores 1.0
    "binary_matrix": _is_oracle,
    "spiral_matrix": _is_oracle,
    "string_insertion": _is_oracle,
    "n_queens": lambda answer, oracle, metadata: answer in metadata["valid_answers"],
    # they execute it, and other texts can be right
    "countdown": _uses(lambda metadata: metadata["target"]),
    "puzzle24": _uses(lambda metadata: 24),  # the scorer takes any four numbers, and 24.9
    "simple_integration": _algebra,
    "intermediate_integration": _algebra,
    "polynomial_multiplication": _algebra,
    # they give 1.0 for what is wrong
    "complex_arithmetic": _matches(r"[0-9+\-.ij() ]+"),  # NaN
    "figlet_font": _same_letters,  # any ten letters in place
    "fraction_simplification": _matches(r"\$?\s*(?:-?\d+\s*/\s*-?\d+|\\d?frac\{\d+\}\{\d+\})\s*\$?"),  # what follows
    "game_of_life": _same_json,  # more cells than there are
    "game_of_life_halting": _is_oracle,  # any text
    "gsm_symbolic": _same_number,  # the first number, without its sign
    "letter_jumble": _same_words,  # words that follow
    "number_sorting": _sorted_numbers,
    "quantum_lock": _matches(r"[A-C](?:(?:\s|→|->|,)*[A-C])*"),  # letters of any text
    "word_sorting": _same_list,  # words that follow
}
