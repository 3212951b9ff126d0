"""What an answer must be before a scorer of reasoning-gym sees it.

The package's scorers are made for honest answers. Some execute what they get, some give full marks for what is not
right: puzzle24 takes any four numbers, number_sorting takes NaN, game_of_life_halting takes any text. A guard here is a
pure function that returns False for what can be no right answer; what it lets pass still has to score 1.0 there. Found
by reading every scorer of 0.1.25.
"""

import ast
import json
import re
from collections.abc import Callable

from minirl.rewards.numbers import whole_number
from minirl.tasks.countdown import evaluate

FOREIGN = re.compile(r"""__|["'`;\\]|\b(?:lambda|import|eval|exec|open|nan|inf|infinity)\b""", re.IGNORECASE)
FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "C"}  # in integrals; but no integrate(...) of the question


def may_be_right(name: str, answer: str, entry: dict) -> bool:
    """Whether the data set's scorer may be asked about this answer to the problem entry {answer, metadata}."""
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
    """What an answer holds only where the oracle does, too; one quotation mark is as good as the other."""
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
    """The scorer forgives an error of 1 in every number."""
    try:
        found = [float(number) for number in json.loads(answer.replace("'", '"'))]
        wanted = [float(number) for number in ast.literal_eval(oracle)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False
    return len(found) == len(wanted) and all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True))


def _uses(target: Callable[[dict], int]) -> Callable[[str, str, dict], bool]:
    """An expression that reaches the target with each of the numbers exactly once, by minirl's own parser."""

    def guard(answer: str, oracle: str, metadata: dict) -> bool:
        return evaluate(answer) == (target(metadata), sorted(metadata["numbers"]))

    return guard


def _algebra(answer: str, oracle: str, metadata: dict) -> bool:
    """A formula of the oracle's names and elementary functions: names would be looked up in sympy and called."""
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
