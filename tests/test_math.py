r"""The reward `math`: reference answers as in the MATH data set, and completions that answer in a \boxed{} and without.

The comparison is called here in this process: the sandbox around it, where each takes a tenth of a second, is tested by
the corpus in test_adversarial.py.
"""

import re
import subprocess
import sys

import pytest

import minirl.rewards.math as math_reward
from minirl.rewards import REWARDS
from minirl.rewards.numbers import answer_number

pytest.importorskip("math_verify")
from minirl.rewards.equality import is_equal, reading, simplest

MATH = [  # a reference answer, and answers that are wrong: a part of it, or a near miss
    (r"2\sqrt{3}", ["2", r"2\sqrt{5}", r"3\sqrt{2}"]),
    (r"5\sqrt{2}", ["5", "2"]),
    (r"70\sqrt{2}", ["70"]),
    (r"3\pi", ["3", r"3\pi^2"]),
    (r"12\pi", ["12", r"2\pi"]),
    ("2^{10}", ["2", "10", "2^{9}"]),
    (r"1.5 \times 10^{8}", ["1.5", r"1.5 \times 10^{7}"]),
    ("2e", ["2"]),
    (r"\ln 2", ["2"]),
    ("3+4i", ["3", "4", "3-4i"]),
    ("6+9i", ["6", "6-9i"]),
    ("5x^2+3", ["5", "3", "5x^2-3"]),
    ("2k+2", ["2", "2k"]),
    ("y = 2x+3", ["2", "3", "y = 2x-3"]),
    (r"3\frac{1}{5}", ["3", r"\frac{1}{5}", r"\frac{3}{5}"]),
    (r"1 \pm \sqrt{19}", ["1", r"1 + \sqrt{19}", r"1 \pm \sqrt{17}"]),
    (r"-3 \le x \le 2", ["-3", "2", r"-3 \le x \le 3", "-3 < x < 2"]),
    (r"\left( 3, \frac{\pi}{2} \right)", ["3", r"(3, \pi)"]),
    ("2,3", ["2", "3", "2,4"]),
    ("1,-2", ["1", "-2", "1,2"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", ["1", "2", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"]),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", ["1", "4", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}"]),
    (r"\text{Evelyn}", ["1", r"\text{Carla}", r"\text{E}"]),
    (r"5\text{ cm}", ["6", "50"]),
    ("1,000", ["1", "1000.5"]),
    (r"12,\!000", ["12", "1200"]),
    ("12{,}000", ["12"]),
    (r"50\%", ["5", "51"]),
    (r"\$7", ["8", "70"]),
    (r"90^\circ", ["9", "91"]),
    (r"90^{\circ}", ["9"]),
    ("[2,5)", ["2", "(2,5)", "[2,5]"]),
    (r"[0,\infty)", ["0", r"(0,\infty)"]),
    (r"(-\infty, 3)", ["3", r"(-\infty, 3]"]),
    (r"(-\infty,-1)\cup(1,\infty)", ["-1", r"(-\infty,-1)"]),
    (r"\{1,2,3\}", ["1", r"\{1,2\}"]),
    ("(3,4)", ["3", "(4,3)"]),
    ("(1,2,3)", ["1", "(1,2)"]),
    (r"\frac{1}{2}", ["1", "2"]),
    (r"\dfrac{3}{4}", ["3"]),
    (r"\tfrac{3}{4}", ["3", "4"]),
    (r"\frac12", ["1", "12"]),
    (r"-\frac{1}{2}", [r"\frac{1}{2}"]),
    (r"\frac{\sqrt{3}}{2}", ["3", r"\frac{\sqrt{2}}{2}"]),
    (r"\frac{\pi}{6}", ["6", r"\frac{\pi}{3}"]),
    ("111_2", ["111", "7", "111_3"]),
    ("x=5", ["6", "x=6", "50"]),
    ("x = -5", ["5"]),
    ("7", ["8", "-7"]),
    ("-7", ["7"]),
    ("0.5", ["5"]),
    (".35", ["35"]),
    ("0", ["1"]),
    (r"\sqrt{5}", ["5"]),
    ("x^2+2x+1", ["1", "x^2+2x"]),
    ("(x+1)(x-2)", ["1", "(x+1)(x+2)"]),
    (r"\text{(A)}", [r"\text{(B)}", "A B"]),
    ("A", ["B"]),
    (r"\text{A}", [r"\text{B}"]),
    (r"\text{June 20}", ["20", r"\text{June 21}", "June"]),
    (r"\text{Monday}", [r"\text{Tuesday}"]),
    (r"\text{even}", [r"\text{odd}"]),
    (r"2\sqrt{2}+1", ["1", "2"]),
    (r"\frac{2+\sqrt{3}}{4}", ["4", "2"]),
    (r"\cot x", [r"\tan x"]),
    (r"\sin 2x", ["2"]),
    ("e^{2}", ["2"]),
    (r"\log_2 3", ["3", "2"]),
    ("10!", ["10"]),
    (r"\binom{5}{2}", ["5", "2"]),
    (r"\$32,\!348", ["32", "348"]),
    (r"6 \text{ inches}", ["7"]),
    (r"20 \text{ units}^2", ["2", "400"]),
    ("f(x) = x^2", ["2", "x^3"]),
    ("3:2", ["3", "2", "2:3"]),
    (r"10\,000", ["10"]),
    ("4x^3 - 3x", ["4", "3"]),
    (r"\infty", ["1"]),
    (r"\emptyset", ["0"]),
    (r"2\cdot 3^{5}", ["2"]),
    ("1{,}234{,}567", ["1"]),
    (r"75^\circ", ["7"]),
    (r"\text{no solution}", ["0"]),
    (r"\sqrt[3]{2}", ["2", "3"]),
    ("i", ["1"]),
    ("-2 + 2i", ["2"]),
    ("AB", ["A"]),
    ("x > 3", ["3", "x < 3"]),
    (r"x \in [2,3]", ["2"]),
    (r"\frac{x+2}{7}", ["7"]),
    (r"11\frac{1}{4}", ["11"]),
    (r"137 \frac{1}{2}", ["137"]),
    (r"\frac{3}{56}", ["3"]),
    (r"5.4 \text{ cents}", ["5"]),
    ("14,916", ["14", "916"]),
    (r"1 \pm \sqrt{3}i", ["1"]),
    (r"\boxed{2\sqrt{3}}", ["2"]),
    (r"$2\sqrt{3}$", ["2"]),
    (r"\(2\sqrt{3}\)", ["2"]),
    ("1/2", ["1"]),
    ("2*sqrt(3)", ["2"]),
    (r"10\%", ["10.5"]),
    ("2516_8", ["2516"]),
    (r"\sec x", ["1"]),
    ("7x-y", ["7"]),
    (r"9\text{ m/s}", ["8"]),
]

TWO = [  # completion, score, why; the answer is 2
    ("The answer is 2.", 1, "right, in a sentence"),
    ("so $x = 2$.", 1, "right, in dollars"),
    ("so $x = 2$", 1, "right, in dollars"),
    (r"\[x = 2\]", 1, "right, in brackets"),
    (r"so \(x=2\), as said", 1, "right, in parentheses"),
    ("x = 2", 1, "right, unmarked"),
    ("We get 3x + 2 = 8, so x = 2.", 1, "right, after another equation"),
    ("**Answer: 2**", 1, "right, in bold type"),
    ("a) 2", 1, "right, in a list"),
    ("= 2", 1, "right, behind a sign of equality"),
    ("2 apples", 1, "right, with a unit"),
    ("$2$ dollars", 1, "right, with a unit"),
    (r"\boxed{2\text{ cm}}", 1, "right, with a unit"),
    ("4 / 2", 1, "arithmetic"),
    ("The final answer is $2$. I hope it is correct.", 1, "right, in the words of a known prompt"),
    (r"\fbox{2}", 1, "the other box"),
    (r"2\sqrt{3}", 0, "not the number in front of it"),
    (r"The answer is 2\sqrt{3}.", 0, "not the number in front of it"),
    (r"so we get 2 \sqrt{3} here", 0, "not the number in front of it"),
    (r"$2\sqrt{3}", 0, "a dollar that is not closed"),
    ("2^{10}", 0, "a power"),
    ("so it is 2^{10}", 0, "a power"),
    ("2+3i", 0, "a complex number"),
    ("It is 2 + 3i.", 0, "a complex number"),
    ("2x", 0, "a product"),
    ("It is 2x+1", 0, "a sum"),
    ("2*sqrt(3)", 0, "a product"),
    (r"2 \times 10^3", 0, "a product"),
    ("2√3", 0, "a product"),
    ("2π", 0, "a product"),
    ("2³", 0, "a power"),
    ("2/x", 0, "a quotient"),
    (r"\sqrt{2}", 0, "a root"),
    (r"\ln 2", 0, "a logarithm"),
    ("x > 2", 0, "an inequality"),
    ("2, 3", 0, "two numbers"),
    ("(2, 3)", 0, "a point"),
    ("11_2", 0, "another base"),
    (r"$2\foo{@}$", 0, "what cannot be read has no part that counts"),
    (r"2 \boxed{}", 0, "an empty box"),
    (r"2 \boxed{@}", 0, "a box that cannot be read"),
    (r"2 \boxed{3", 0, "a box that is not closed"),
    (r"\boxed{2} \fbox{2}", 1, "equal boxes are one answer"),
    (r"\boxed{2} \fbox{3}", 0, "several boxes"),
    ("It is 2 million.", 0, "a word that makes another number of it"),
    (r"\boxed{2\text{ thousand}}", 0, "a word that makes another number of it"),
    ("2 and a half", 0, "a mixed number in words"),
    ("minus 2", 0, "the sign in a word"),
    (r"\boxed{\text{minus } 2}", 0, "the sign in a word"),
]

OTHERS = [  # reference answer, completion, score
    ("1/2", r"The answer is \frac{1}{2}.", 1),
    (r"2\sqrt{3}", r"The answer is 2\sqrt{3}.", 1),
    (r"2\sqrt{3}", r"so x = 2\sqrt{3}", 1),
    (r"2\sqrt{3}", r"$\sqrt{12}$", 1),
    (r"(2,\sqrt{3})", r"It is (2, \sqrt{3}).", 1),
    ("x^2+1", "It is x^2 + 1.", 1),
    ("1024", "2^{10}", 1),
    (r"50\%", "50%", 1),
    (r"50\%", r"\boxed{50}", 1),
    (r"90^\circ", "90°", 1),
    ("90", r"90^\circ", 1),
    (r"5\text{ cm}", r"\boxed{5}", 1),
    (r"12,\!000", "12,000", 1),
    (r"\$7", "$7", 1),
    ("x=5", r"\boxed{5}", 1),
    ("111_2", r"\boxed{111}", 0),
    (r"\frac{1}{3}", "0.333333", 0),  # numbers that differ only far behind the point
    ("0.3333333", r"\boxed{0.33333334}", 0),
    (r"\sqrt{2}", "1.414214", 0),
    (r"(0.3333333,1)", r"$(0.33333334,1)$", 0),
    ("0.30", r"\boxed{\frac{3}{10}}", 1),
    ("1,234.5", "1234.50", 1),
    ("111", r"\boxed{111_2}", 0),
    ("5 thousand", r"\boxed{5 thousand}", 1),
    ("5 thousand", r"\boxed{5}", 0),
    (r"5\text{ million}", "5", 0),
    ("1.5 million", r"\boxed{15 million}", 0),
    (r"5\text{ million}", r"\boxed{5\text{ thousand}}", 0),
    (r"5\text{ million}", r"\boxed{5\text{ million}}", 1),
    (r"5\text{ million}", r"$5$ million.", 1),
]


def boxed(answer: str) -> str:
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}}}"


@pytest.mark.parametrize(("gold", "wrong"), MATH)
def test_a_reference_answer_in_a_box_is_right_and_its_parts_are_wrong(gold, wrong):
    assert is_equal(gold, boxed(gold))
    assert [text for text in wrong if is_equal(gold, boxed(text)) or is_equal(gold, text)] == []


def test_a_reference_answer_without_a_box_is_right_too():
    words = {"AB"}  # bare words are no mathematics
    assert [gold for gold, _ in MATH if not is_equal(gold, gold) and gold not in words] == []


@pytest.mark.parametrize(("completion", "expected", "why"), TWO)
def test_a_number_is_an_answer_only_if_it_stands_alone(completion, expected, why):
    assert is_equal("2", completion) == expected, why


@pytest.mark.parametrize(("gold", "completion", "expected"), OTHERS)
def test_equal_in_another_form(gold, completion, expected):
    assert is_equal(gold, completion) == expected


BOUND = r"""
-B ; -(B) ; -$B$ ; - B ; -\(B\) ; -\left(B\right) ; \pm B ; x \neq B ; 10 - B ; 1+B ; B + 1 ; B - 1
\sqrt{B} ; \sqrt[3]{B} ; √B ; \sin B ; \log_2 B ; f(B) ; \frac{1}{B} ; \frac{B}{2} ; B/2 ; x_{B} ; 10^{B} ; 2**B
B^2 ; (B)^2 ; B$^2$ ; B^{-1} ; B**2 ; B! ; B squared ; B*2 ; B * 2 ; 3 * B ; 2B ; 2(B) ; xB ; x^{2}B ; 2\,B ; \frac12B
2\cdot B ; B\pi ; B\sqrt{2} ; B \times 10^3 ; Bi ; B0 ; B½ ; B ½ ; B\frac{1}{2} ; B and a half ; half of B ; not B
B,000 ; B{,}000 ; B\,000 ; B.5 ; B million ; B\text{ million} ; minus B ; B or 8 ; B \text{ or } 8 ; $B$ or $8$ ; (B, 8)
"""
FREE = r"""
B ; = B ; $B$ ; $$B$$ ; \(B\) ; (B) ; [B] ; {B} ; \left(B\right) ; \[ B \] ; **B** ; **$B$** ; *B* ; `B` ; "B" ; B.
B dollars ; B km/h ; B% ; B\% ; B^\circ ; B/day ; x = B \text{ cm} ; 5 + 2 = B ; x=$B$, as said ; It is B! ; 8 B
The answer is: B ; **Answer: B** ; - Answer: B ; Answer: B - done ; the answer (B). ; B, and ; B or B ; B, so B
\text{so }B ; \textbf{B} ; \mathbf{B} ; \color{red}{B} ; \begin{aligned} x &= B \end{aligned} ; \therefore B ; \quad B
\displaystyle B ; B \quad \blacksquare ; B \in \mathbb{Z} ; B \approx 7.0 ; $B$.
"""


@pytest.mark.parametrize(("table", "right"), [(BOUND, False), (FREE, True)])
def test_a_box_is_an_answer_only_if_it_stands_free(table, right):
    texts = [text.replace("B", r"\boxed{7}") for text in re.split(" ; |\n", table.strip())]
    assert [text for text in texts if is_equal("7", text) != right] == []
    assert [text for text in texts if (answer_number(text) == 7) != right] == []


def test_votes_are_of_the_whole_expression():
    texts = (r"2\sqrt{3}", "It is 2x + 1.", "so 2", r"\boxed{1}\boxed{2}")
    assert [reading(text) for text in texts] == ["2*sqrt(3)", "2*x + 1", "2", None]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{\sqrt2}{2}", r"\frac1{\sqrt2}"),
        ("3^{10}", "59049"),
        (r"\log_2 8", "3"),
        (r"50\%", r"\frac12"),
        (r"\{\sqrt8,1\}", r"\{1,2\sqrt2\}"),
        (r"[1,\sqrt8)", r"[1,2\sqrt2)"),
        (r"x<\frac62", "x<3"),
        (r"\begin{pmatrix}(x+1)^2\\1\end{pmatrix}", r"\begin{pmatrix}x^2+2x+1\\1\end{pmatrix}"),
        ("x=7", "7"),
    ],
)
def test_equal_answers_are_one_vote(one, other):
    votes = {simplest(rf"\boxed{{{text}}}") for text in (one, other)}
    assert len(votes) == 1
    assert is_equal(one, rf"\boxed{{{other}}}")
    assert votes.isdisjoint(simplest(rf"\boxed{{{text}}}") for text in ("2", r"\sqrt{3}", "[1,2)", "x", "x<4"))


def test_a_float_of_the_reference_is_its_digits():
    """Python writes 1e-05 and 1e+20."""
    completions, answers = ["0.00001", "1e-05", "1" + "0" * 20], [1e-05, 1e-05, 1e20]
    assert REWARDS["math"](prompts=["p"] * 3, completions=completions, answer=answers) == [1, 0, 1]


def test_a_reference_with_a_unit_or_a_point_is_the_number_that_it_says():
    units = {
        "18.": ["18", r"\boxed{18}"],
        "-4 dollars": [r"\boxed{-4}", "-4 dollars", r"\boxed{-4 dollars}"],
        "1,000,000 people": [r"\boxed{1000000}", "1,000,000 people"],
        "£18": ["18", "£18", r"\boxed{£18}"],
        "4/5 cups": [r"\boxed{\frac45}", "4/5"],
        "5 km/h": ["5", r"\boxed{5 km/h}"],
        "-3°C": ["-3", "-3°C", r"\boxed{-3^\circ\text{C}}"],
        r"50\%": ["50%", r"\frac12"],
        "½": ["0.5", "½", r"\boxed{\frac12}", r"\boxed{½}"],
    }
    pairs = [(answer, text) for answer, texts in units.items() for text in texts]
    assert [pair for pair in pairs if not is_equal(math_reward._gold(pair[0]), pair[1])] == []
    wrong = ["17", "4", "1", "18.5", "5", "3", "0.4", "2 ½"]
    assert [(a, text) for a in units for text in wrong if a != "5 km/h" and is_equal(math_reward._gold(a), text)] == []


AFTERWARDS = r"""
import sys
from minirl.rewards.equality import is_equal
known = set(sys.modules)
for answer, completion in (line.split(" ; ") for line in sys.argv[1].splitlines()):
    is_equal(answer, completion)
print(*sorted(sys.modules.keys() - known))
"""
COMPARED = r"""(x-3)^2 ; $x^2-6x+9$
y=7 ; $7=y$
2-i ; $\frac{5}{2+i}$
(3,\frac{\pi}{2}) ; $(3,1)$
[0,7) ; $[0,\frac{14}{2})$
(-\infty,3)\cup(5,7) ; $(5,7)$
\{1,4\} ; $\{4,1\}$
x>5 ; $5<x$
\begin{pmatrix}5\\7\end{pmatrix} ; $\begin{pmatrix}5\\9\end{pmatrix}$
\frac{\sqrt{12}}{4} ; $\frac{\sqrt3}{2}$
\tan x ; $\frac{\sin x}{\cos x}$
\ln 8 ; $3\ln 2$
\int_0^1 y^2 dy ; $\frac13$
\binom{7}{3} ; $35$
\text{Monday} ; \boxed{\text{Sunday}}
111_2 ; 7"""


def test_a_comparison_imports_nothing_that_is_not_there_when_the_file_is_loaded():
    """In the sandbox every comparison has a process of its own, which would import it again."""
    found = subprocess.run([sys.executable, "-c", AFTERWARDS, COMPARED], capture_output=True, check=True)
    assert found.stdout.split() == [], found.stdout


def test_a_reference_answer_that_took_too_long_is_read_again(monkeypatch):
    late, calls = [TimeoutError("no result within 5 s")], []

    def answers(name, arguments):
        calls.append((name, arguments))
        return [late.pop() if late and name == "is_readable" else True for _ in arguments]

    monkeypatch.setattr(math_reward, "_calls", answers)
    monkeypatch.setattr(math_reward, "_readable", {})
    scores = [REWARDS["math"](prompts=["p"], completions=["7"], answer=["7"]) for _ in range(3)]
    assert scores == [[None], [1.0], [1.0]]
    assert [arguments for name, arguments in calls if name == "is_readable"] == [[("7",)], [("7",)], []]
