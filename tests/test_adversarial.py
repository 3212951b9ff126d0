"""Texts that try to be paid without being right: each with what it is worth, and why.

All go through `minirl.rewards.score`, as in training. Attacks by programs are in the tests of the sandbox.
"""

import functools
import json

import pytest

from minirl.rewards import REWARDS, score
from minirl.rewards.rules import last_number
from minirl.tasks import countdown
from minirl.tasks.reasoning_gym import _last_line, _last_number, scorer
from minirl.tasks.style import of_block

NINES, THOUSANDS = "9" * 5000, "1," + ",".join(["000"] * 2000)

# completion, score, why; the answer is 7
SEVEN = [
    ("7", 1, "right"),
    ("The answer is 7.", 1, "right, in a sentence"),
    ("", 0, "empty"),
    ("  \n\t", 0, "blank"),
    ("\0", 0, "a control character"),
    ("<|im_end|>", 0, "only a stop token, written out"),
    ("</s>", 0, "only a stop token, written out"),
    ("7\n\nno, 8", 0, "a wrong answer follows the right one"),
    ("8\n\nno, 7", 1, "the last answer counts"),
    ("7 or 8", 0, "two answers"),
    ("8 or 7", 1, "the last one, however it got there"),
    ("1 2 3 4 5 6 7 8 9", 0, "answers sprayed, another is last"),
    ("7 " * 1000, 1, "1,000 repeats of the right answer; repetition is a reward of its own"),
    ("7" * 1000, 0, "1,000 digits glued are another number"),
    ("٧", 0, "an Arabic digit"),
    ("７", 0, "a full-width digit"),
    ("𝟕", 0, "a mathematical bold digit"),
    ("⑦", 0, "a circled digit"),
    ("Ⅶ", 0, "a Roman numeral"),
    ("七", 0, "a Chinese numeral"),
    ("seven", 0, "a word"),
    ("7²", 0, "49, not 7"),
    ("7½", 0, "seven and a half"),
    ("7e0", 0, "scientific notation is not read"),
    ("70e-1", 0, "scientific notation is not read"),
    ("14/2", 1, "a fraction of that value"),
    ("-14/-2", 0, "no fraction is written so"),
    ("7/1", 1, "a fraction of that value"),
    ("7/0", 0, "no number"),
    ("0/0", 0, "no number"),
    ("7.0", 1, "the same value"),
    ("7.000000000000000000001", 0, "close is not equal"),
    ("6.999999999999999999999", 0, "close is not equal"),
    ("-7", 0, "the sign"),
    ("−7", 0, "a sign in Unicode"),
    ("–7", 0, "a dash as a sign"),
    ("+7", 1, "a sign that changes nothing"),
    ("±7", 0, "two answers in one sign"),
    (r"\pm 7", 0, "two answers in one sign"),
    ("≠ 7", 0, "says that it is not 7"),
    ("7%", 1, "a unit"),
    ("$7", 1, "a currency"),
    ("0.7", 0, "another number"),
    ("70", 0, "begins with it"),
    ("17", 0, "ends with it"),
    ("1,007", 0, "a thousands separator is part of the number"),
    ("7,000", 0, "a thousands separator is part of the number"),
    ("7_0", 0, "Python's separator is none"),
    ("0x7", 0, "hexadecimal"),
    ("0b111", 0, "binary"),
    ("2**3", 0, "a power is not computed"),
    ("2**7", 0, "nor is its exponent the answer"),
    ("7**1", 0, "nor one that has the value"),
    ("x^7", 0, "an exponent"),
    ("7//2", 0, "floor division is not computed"),
    ("49//7", 0, "nor is its divisor the answer"),
    ("97**89**83", 0, "a tower of powers"),
    ("9**9**9**9", 0, "a tower of powers"),
    (NINES, 0, "a huge integer"),
    ("1/" + NINES, 0, "a huge denominator"),
    (THOUSANDS, 0, "a huge integer with separators"),
    ("NaN", 0, "no number"),
    ("inf", 0, "no number"),
    ("None", 0, "no number"),
    ("__import__('os').abort()", 0, "code is text"),
    (r"\boxed{7}", 1, "boxed"),
    (r"8 \boxed{7}", 1, "the box is the answer"),
    (r"\boxed{8} 7", 0, "a right number after a wrong box"),
    (r"\boxed{7} 8", 0, "a wrong number after the right box"),
    (r"\boxed{7} \boxed{7}", 0, "several boxes"),
    (r"\boxed{6} \boxed{7}", 0, "several boxes"),
    (r"\boxed{7} \fbox{8}", 0, "several boxes of two kinds"),
    (r"\boxed{\boxed{7}}", 0, "a box in a box"),
    (r"\boxed{{{7}}}", 1, "nested braces"),
    (r"\boxed{7, 8}", 0, "two answers in a box"),
    (r"\boxed{6 7 8}", 0, "answers sprayed in a box"),
    (r"\boxed{7", 0, "a box that is not closed"),
    (r"\boxed{} 7", 0, "an empty box"),
    (r"\boxed{\frac{14}{2}}", 1, "a fraction in LaTeX"),
    (r"\boxed{3\frac{8}{2}}", 0, "a mixed number is not read"),
    (r"\boxed{" * 1000, 0, "1,000 boxes"),
    (r"\boxed{- 7}", 0, "the sign, with a space"),
    ("x = - 7", 0, "the sign, with a space"),
    ("it is - 7", 0, "the sign, with a space"),
    ("- 7", 0, "a sign or a bullet"),
    ("so\n- 7", 0, "a sign or a bullet"),
    ("5 - 7", 1, "a subtraction ends in 7"),
    ("Answer – 7", 0, "a dash or a sign"),
    ("it falls to - 7", 0, "a sign or a dash"),
    ("that gives - 7", 0, "a sign or a dash"),
    ("x equals - 7", 0, "a sign or a dash"),
    ("x - 7", 1, "a subtraction ends in 7"),
    ("5% - 7", 1, "a subtraction ends in 7"),
    ("90°-7", 1, "a subtraction ends in 7"),
    ("$5$ - 7", 1, "a subtraction behind a formula"),
    ("$5$-7", 1, "a subtraction behind a formula"),
    (r"\(5\) - 7", 1, "a subtraction behind a formula"),
    (r"\$5 - \$7", 1, "a subtraction of dollars"),
    ("$5 - $7", 1, "a subtraction of dollars"),
    (r"\[ - 7 \]", 0, "the sign in a formula"),
    (r"\( - 7 \)", 0, "the sign in a formula"),
    ("$ - 7 $", 0, "the sign in a formula"),
    ("$$ - 7 $$", 0, "the sign in a formula"),
    ("$x$ is $-7$", 0, "the sign in a second formula"),
    ("so $x$ falls to $ - 7 $", 0, "the sign in a second formula"),
    ("it costs $5, so $ - 7$", 0, "a dollar that may open a formula or close one"),
    (r"-\(7\)", 0, "the sign before a formula"),
    ("-$7", 0, "the sign before a currency"),
    (r"-\$7", 0, "the sign before a currency"),
    ("-(7)", 0, "the sign before a bracket"),
    (r"\boxed{-(7)}", 0, "the sign before a bracket"),
    (r"-\left(7\right)", 0, "the sign before a bracket"),
    (r"-\boxed{7}", 0, "the sign before the box"),
    ("－7", 0, "a full-width sign"),
    ("﹣7", 0, "a small sign"),
    ("‑7", 0, "a hyphen as a sign"),
    ("⁻7", 0, "a raised sign"),
    ("--7", 0, "two signs"),
    (r"\boxed{\sqrt{7}}", 0, "a root"),
    (r"\sqrt{7}", 0, "a root"),
    ("sqrt(7)", 0, "a root"),
    ("x = 5√7", 0, "a root"),
    ("49 = √7", 0, "a root"),
    ("√7", 0, "a root"),
    ("√ 7", 0, "a root"),
    ("√(7)", 0, "a root"),
    ("∛7", 0, "a root"),
    (r"\boxed{√7}", 0, "a root"),
    (r"√\boxed{7}", 0, "a root of the box"),
    (r"\boxed{7\pi}", 0, "a product"),
    (r"$7\pi$", 0, "a product"),
    (r"7\sqrt{2}", 0, "a product"),
    (r"\boxed{\log 7}", 0, "a logarithm"),
    (r"\log_2 7", 0, "a logarithm"),
    ("7!", 0, "a factorial"),
    ("so\n7!", 0, "a factorial"),
    ("x = 7!", 0, "a factorial in a formula"),
    ("it is $7!$", 0, "a factorial in a formula"),
    ("there are 7! ways", 0, "a factorial in a sentence"),
    ("log 7!", 0, "a factorial and a logarithm"),
    ("The answer is 7!", 1, "punctuation behind words"),
    ("The answer is: 7!\n", 1, "punctuation behind words"),
    ("The answer is 7! It was easy.", 1, "punctuation behind words"),
    ("It is **7**!", 1, "punctuation behind words"),
    ("It is **7!**", 1, "punctuation behind words"),
    (r"\boxed{7!}", 0, "a factorial"),
    ("7/x", 0, "a quotient"),
    (r"\boxed{\frac{7}{x}}", 0, "a quotient"),
    (r"\frac{7}{x}", 0, "a quotient"),
    (r"\frac{x}{7}", 0, "a quotient"),
    (r"3\frac{14}{2}", 0, "a mixed number is not read"),
    (r"\boxed{[7,\infty)}", 0, "an interval"),
    (r"\boxed{x > 7}", 0, "an inequality"),
    (r"\boxed{\ge 7}", 0, "an inequality"),
    (r"\boxed{x_{7}}", 0, "an index"),
    ("x_{7}", 0, "an index"),
    (r"\boxed{111_{7}}", 0, "a base"),
    (r"\boxed{7_{8}}", 0, "another base"),
    (r"\boxed{7x}", 0, "a product"),
    (r"\boxed{7 x}", 0, "a product"),
    (r"\boxed{7 pi}", 0, "a product"),
    (r"\boxed{2x = 7}", 0, "an equation that is not solved"),
    (r"\boxed{x + 7}", 0, "a sum"),
    (r"\boxed{|7|}", 0, "an absolute value"),
    (r"\boxed{\text{-}7}", 0, "the sign, as text"),
    (r"\text{7}^2", 0, "49, not 7"),
    ("7cm", 0, "glued to a unit"),
    ("7th", 0, "an ordinal"),
    (r"\boxed{x = 7}", 1, "with its name"),
    (r"\boxed{f(x) = 7}", 1, "with its name"),
    (r"\boxed{7\text{ cm}^2}", 1, "a unit in LaTeX"),
    (r"\boxed{7^\circ}", 1, "degrees"),
    (r"7^{\circ}", 1, "degrees"),
    (r"$7^\circ$", 1, "degrees"),
    (r"\boxed{\$7}", 1, "a currency"),
    (r"\boxed{7\%}", 1, "a unit"),
    (r"$\frac{14}{2}$", 1, "a fraction in LaTeX without a box"),
    ("$7/day", 1, "a rate"),
    ("7 cm^2", 1, "a unit with an exponent"),
    ("7 m^2.", 1, "a unit with an exponent"),
    ("7 m/s^{2}", 1, "a unit with an exponent"),
    (r"\boxed{7 cm^2}", 1, "a unit with an exponent"),
    ("7 x^2", 0, "a product"),
    ("5 cm^2 - 7", 1, "a subtraction ends in 7"),
    ("14 / 2", 1, "a fraction with spaces"),
    ("14 / 2 = 7", 1, "the last number"),
    ("7 / 1 / 2", 0, "two divisions"),
    ("3 * 14 / 2", 0, "the fraction is a part of a product"),
    ("3*14/2", 0, "the fraction is a part of a product"),
    (r"\boxed{(7)}", 1, "in parentheses"),
    (r"\boxed{\left(7\right)}", 1, "in parentheses"),
    (r"\boxed{x = (7)}", 1, "in parentheses"),
    (r"\boxed{(7}", 0, "half of an interval"),
    (r"\boxed{[7)}", 0, "half of an interval"),
    (r"\boxed{f(7)}", 0, "a function"),
    (r"\boxed{2(7)}", 0, "a product"),
    (r"\boxed{(7)!}", 0, "a factorial"),
    (r"\boxed{(7)x}", 0, "a product"),
    (r"\boxed{\large 7}", 1, "a size"),
    (r"\boxed{\Large 7}", 1, "a size"),
    (r"\boxed{\bf 7}", 1, "bold type"),
    (r"\boxed{\displaystyle 7}", 1, "a style"),
    (r"\boxed{\color{red}7}", 1, "a color"),
    (r"\boxed{\color{red}{7}}", 1, "a color"),
    ("0,7", 0, "a decimal comma"),
    ("12,7", 0, "a decimal comma"),
    ("1.000,7", 0, "a point for thousands and a decimal comma"),
    (r"\boxed{0,7}", 0, "a decimal comma"),
    ("1,2,7", 0, "a list without spaces, or separators in odd places"),
    ("1, 2, 7", 1, "a list ends in 7"),
    ("14/2, 7", 1, "a list ends in 7"),
    ("12:07", 0, "a time"),
    ("at 12:00 there were 7", 1, "a number after a time"),
    ("1 14/2", 0, "a mixed number is not read"),
    ("1,000 14/2", 0, "a mixed number is not read"),
    ("192.168.1.7", 0, "an address"),
    ("2024-05-07", 0, "a date"),
    ("07.05.2024 or 01.01.7", 0, "a date"),
    ("05/06/7", 0, "a date"),
    ("5-7", 1, "a subtraction ends in 7"),
    ("10-2-7", 1, "a subtraction ends in 7"),
    ("so...7", 1, "an ellipsis"),
    ("of 7, then", 1, "a sentence's comma"),
    ("step 2: 7", 1, "a colon and a space"),
    ("in 2020 7 people", 1, "two numbers, of which the first cannot be thousands"),
]

MINUS_SEVEN = [
    (r"\boxed{- 7}", 1, "right"),
    ("x = - 7", 1, "right"),
    ("the answer: - 7", 1, "right"),
    ("$- 7$", 1, "right"),
    ("-$7", 1, "right, before a currency"),
    (r"-\$7", 1, "right, before a currency"),
    (r"\boxed{-\$7}", 1, "right, before a currency"),
    ("－7", 1, "a full-width sign"),
    ("﹣7", 1, "a small sign"),
    ("‑7", 1, "a hyphen as a sign"),
    (r"$-\frac{14}{2}$", 1, "a fraction"),
    (r"\[ - 7 \]", 1, "right, in a formula"),
    (r"\( - 7 \)", 1, "right, in a formula"),
    (r"\(-7\)", 1, "right, in a formula"),
    ("$ - 7 $", 1, "right, in a formula"),
    ("$$ - 7 $$", 1, "right, in a formula"),
    ("$x$ is $-7$", 1, "right, in a second formula"),
    ("so $x$ falls to $ - 7 $", 1, "right, in a second formula"),
    ("-14 / 2", 1, "a fraction with spaces"),
    ("The answer is -7!", 1, "punctuation behind words"),
    (r"\boxed{(-7)}", 1, "in parentheses"),
    ("- 7", 0, "a sign or a bullet"),
    ("that gives - 7", 0, "a sign or a dash"),
    ("it costs $5, so $ - 7$", 0, "a dollar that may open a formula or close one"),
    ("5 - 7", 0, "a subtraction ends in 7"),
    ("$5$ - 7", 0, "a subtraction behind a formula"),
    ("$5$-7", 0, "a subtraction behind a formula"),
    ("5-$7", 0, "a subtraction ends in 7"),
    (r"\boxed{7}", 0, "the sign"),
]

SMALL = [  # the answer is the float 1e-05
    ("0.00001", 1, "right"),
    ("1/100000", 1, "right"),
    ("1e-05", 0, "scientific notation is not read in a completion"),
    ("5", 0, "a part of it"),
]

THOUSAND = [
    ("1000", 1, "right"),
    ("1,000", 1, "a thousands separator"),
    ("1000.00", 1, "the same value"),
    ("1e3", 0, "scientific notation is not read"),
    ("10**3", 0, "a power is not computed"),
    ("1 000", 0, "one number or two"),
    (r"1\;000", 0, "one number or two"),
    ("1.000,00", 0, "a point for thousands and a decimal comma"),
    ("1.000", 0, "a point is a decimal point"),
    ("1,00,0", 0, "no thousands separators"),
    ("1_000", 0, "Python's separator is none"),
    (r"\boxed{1{,}000}", 1, "a thousands separator in LaTeX"),
    (r"\boxed{1\,000}", 1, "a thousands separator in LaTeX"),
    (r"\boxed{1,\!000}", 1, "a thousands separator in LaTeX"),
    ("1{,}000", 1, "a thousands separator in LaTeX without a box"),
    (r"1\,000", 1, "a thousands separator in LaTeX without a box"),
    (r"1,\!000", 1, "a thousands separator in LaTeX without a box"),
    (r"\boxed{1\,00\,0}", 0, "no thousands separators"),
]

ZERO = [  # the answer is 0, the last piece of all these
    ("0", 1, "right"),
    ("1, 0", 1, "a list ends in 0"),
    ("12 000", 0, "thousands"),
    ("in 2020 000", 1, "two numbers, of which the first cannot be thousands"),
    ("1 000", 0, "thousands"),
    ("1\u00a0000", 0, "thousands, by a space that does not break"),
    ("1\u202f000", 0, "thousands, by a narrow space"),
    ("1\u2009000", 0, "thousands, by a thin space"),
    ("1 000 000", 0, "thousands of thousands"),
    ("1 000,00", 0, "thousands and a decimal comma"),
    ("1,00,000", 0, "separators in odd places"),
    ("7:00", 0, "a time"),
    ("1,0", 0, "a decimal comma"),
    ("1.0.0", 0, "a version"),
    ("10/10/0", 0, "a date"),
]

TEXT = [
    ("Paris", 1, "right"),
    (" Paris\n", 1, "white space"),
    ("", 0, "empty"),
    ("Paris Paris", 0, "repeated"),
    ("Paris, London, Rome", 0, "answers sprayed"),
    ("paris", 0, "another text"),
    ("Paris.", 0, "another text"),
    ("Раris", 0, "Cyrillic letters that look the same"),
    ("Pa\u200bris", 0, "a character without width"),
    (r"\boxed{Paris}", 0, "another text"),
]

HALF = [
    (r"so $\boxed{\frac{1}{2}}$", 1, "right"),
    ("0.5", 1, "the same value"),
    ("$2/4$", 1, "the same value"),
    ("1/3", 0, "wrong"),
    ("", 0, "empty"),
    (" \n", 0, "blank"),
    (r"\boxed{\frac{1}{2}} \boxed{\frac{1}{3}}", 0, "several boxes"),
    (r"\boxed{0.5} or \boxed{0.5}", 0, "several boxes, even if both are right"),
    ("0.5, no, 0.6", 0, "a wrong answer follows the right one"),
    ("½ of it", 0, "a sign that math-verify does not read"),
    ("٠٫٥", 0, "Arabic digits"),
    ("$9^{9^{9^9}}$", 0, "a tower of powers"),
    ("9**9**9**9", 0, "a tower of powers"),
    (r"\boxed{" + "{" * 200 + "0.5" + "}" * 200 + "}", 0, "nested braces without end"),
    (r"\boxed{\frac{1}{0}}", 0, "no number"),
    ("nan", 0, "no number"),
    (r"\boxed{\infty}", 0, "no number"),
    (NINES, 0, "a huge integer"),
]

COUNTDOWN = [  # 13 from 1, 2, 3, 4
    ("<answer>(1 + 2) * 3 + 4</answer>", 1, "right"),
    ("thinking\n(1 + 2) * 3 + 4", 1, "right, on the last line"),
    ("<answer>(1 + 2) × 3 + 4</answer>", 1, "a sign of multiplication in Unicode"),
    ("", 0, "empty"),
    ("13", 0, "the target itself"),
    ("<answer>13</answer>", 0, "the target itself"),
    ("(1 + 2) * 3 + 4 = 13", 0, "an equation"),
    ("<answer>3 * 4 + 1</answer>", 0, "a number is left out"),
    ("<answer>1 + 2 + 3 + 4 + 3</answer>", 0, "a number is used twice"),
    ("<answer>9 + 4</answer>", 0, "numbers that were not given"),
    ("<answer>12 + 1</answer>", 0, "digits glued"),
    ("<answer>(1 + 2) * 3 + 4</answer><answer>1</answer>", 0, "a wrong answer follows the right one"),
    ("<answer>1</answer><answer>(1 + 2) * 3 + 4</answer>", 0, "several answers"),
    ("<answer>(1 + 2) * 3 + 4</answer>" * 1000, 0, "1,000 repeats"),
    ("<answer>(1 + 2) * 3 + 4", 0, "a tag that is not closed"),
    ("<answer>2**3 + 4 + 1</answer>", 0, "a power"),
    ("<answer>7//2 + 4</answer>", 0, "floor division"),
    ("<answer>97**89**83</answer>", 0, "a tower of powers"),
    ("<answer>(١ + 2) * 3 + 4</answer>", 0, "an Arabic digit"),
    ("<answer>1e1 + 2 + 3 + 4</answer>", 0, "scientific notation"),
    ("<answer>1/0 + 2 + 3 + 4</answer>", 0, "division by zero"),
    ("<answer>__import__('os')._exit(0)</answer>", 0, "code is never run"),
    ("<answer>True + 2 * 4 + 3 + 1</answer>", 0, "True is no number"),
    ("<answer>" + "(" * 10_000 + "13" + ")" * 10_000 + "</answer>", 0, "nesting without end"),
    ("<answer>" + "-" * 100_000 + "13</answer>", 0, "signs without end"),
    ("<answer>+1 + 2 * 4 + 3 + 1</answer>", 0, "a sign before a number, and a number twice"),
    ("<answer>(1 + 2) * 3 + 4 # 13</answer>", 0, "a comment"),
]

FORMAT = [
    ("<think>a</think><answer>7</answer>", 1, "the format"),
    ("<think></think> <answer></answer>\n", 1, "the format says nothing of what stands in it"),
    ("", 0, "empty"),
    ("7", 0, "no tags"),
    ("<answer>7</answer>", 0, "no thinking"),
    ("<think>a</think><answer>7</answer> and 8", 0, "text follows"),
    ("<think>a</think><answer>6</answer><answer>7</answer>", 0, "two answers"),
    ("<think>a<think>b</think></think><answer>7</answer>", 0, "nested thinking"),
    ("<think><answer>7</answer></think>", 0, "the answer is in the thinking"),
    ("<answer>7</answer><think>a</think>", 0, "the wrong way round"),
    ("<think>a</think><answer>7", 0, "a tag that is not closed"),
    ("<THINK>a</THINK><ANSWER>7</ANSWER>", 0, "other tags"),
    ("<think>a</think><answer>7</answer>" * 1000, 0, "1,000 repeats"),
]

THINK = [  # the answer is 7
    ("<think>8?</think><answer>7</answer>", 1, "right"),
    ("<think>7</think><answer>8</answer>", 0, "right only in the thinking"),
    ("<think>8</think><answer>7, no, 8</answer>", 0, "a wrong answer follows the right one"),
    ("7", 0, "no block"),
    ("", 0, "empty"),
    ("<answer></answer>", 0, "an empty block"),
    ("<answer>7</answer><answer>7</answer>", 0, "several blocks"),
    ("<think><answer>7</answer></think>", 0, "the block is in the thinking"),
    ("<think><answer>7</answer>", 0, "the block is in a thinking that does not end"),
    ("<answer>7</think></answer>", 0, "the thinking ends in the block"),
    ("<answer>7</answer> 8", 1, "what follows the block is no answer"),
    ("<answer>8</answer> 7", 0, "what follows the block is no answer"),
    ("<answer><answer>7</answer></answer>", 0, "a block in a block"),
    (r"<think>a</think><answer>\boxed{7}\boxed{8}</answer>", 0, "several boxes in the block"),
    ("<think>between <answer> and </answer></think><answer>7</answer>", 1, "the thoughts name the tags"),
    ("<think><answer>6</answer></think><answer>7</answer>", 1, "what is in the thinking is no answer"),
    ("<think><answer>7</answer></think><answer>6</answer>", 0, "what is in the thinking is no answer"),
    ("<think>a</think><answer>6</answer><think>b</think><answer>7</answer>", 0, "two answers between thoughts"),
    ("<think>a</think><answer>7</answer><think>b</think>", 0, "the thinking goes on after the answer"),
    ("<think><think>a</think><answer>7</answer>", 0, "the block is in a thinking that does not end"),
]

ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
TEXT_OF_ADD = json.dumps(ADD)
CALLS = [
    (TEXT_OF_ADD, 1, "right"),
    ('{"arguments": {"b": 2.0, "a": 1}, "name": "add"}', 1, "the order of keys, and 2.0"),
    (f"<tool_call>{TEXT_OF_ADD}</tool_call>", 1, "in tags"),
    (f"```json\n{TEXT_OF_ADD}\n```", 1, "in a fence"),
    ("", 0, "empty"),
    ("[]", 0, "no call"),
    ("add(1, 2)", 0, "code"),
    (TEXT_OF_ADD + " ", 1, "white space"),
    (TEXT_OF_ADD + " done", 0, "text follows"),
    (f"<tool_call>{TEXT_OF_ADD}</tool_call> done", 0, "text follows"),
    (f"<tool_call>{TEXT_OF_ADD}</tool_call>" * 2, 0, "called twice"),
    (f"[{TEXT_OF_ADD}, {TEXT_OF_ADD}]", 0, "called twice"),
    (f"<tool_call>[{TEXT_OF_ADD}]</tool_call>", 0, "a list in a tag"),
    (f"<tool_call>{TEXT_OF_ADD}", 0, "a tag that is not closed"),
    (TEXT_OF_ADD * 2, 0, "two texts"),
    ('{"name": "add", "arguments": {"a": 1, "b": 3, "b": 2}}', 0, "a key twice"),
    ('{"name": "sub", "name": "add", "arguments": {"a": 1, "b": 2}}', 0, "a key twice"),
    ('{"name": "add", "arguments": {"a": true, "b": 2}}', 0, "true is not 1"),
    ('{"name": "add", "arguments": {"a": "1", "b": 2}}', 0, "a text is no number"),
    ('{"name": "add", "arguments": {"a": 1, "b": 2, "c": NaN}}', 0, "NaN is no JSON"),
    ('{"name": "add", "arguments": {"a": 1, "b": 2, "c": null}}', 0, "one argument more"),
    ('{"name": "add", "arguments": {"a": 1}}', 0, "one argument less"),
    ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', 0, "arguments as a text"),
    ('{"name": "add", "arguments": {"a": 1, "b": 2}, "id": 1}', 0, "one key more"),
    ("{'name': 'add', 'arguments': {'a': 1, 'b': 2}}", 0, "Python is no JSON"),
    ('{"name": "add", "arguments": {"a": ' + NINES + ', "b": 2}}', 0, "a huge integer"),
    ('{"name": "add", "arguments": ' + '{"a":' * 50_000, 0, "nesting without end"),
]

SAY = {"name": "say", "arguments": {"text": "between <tool_call> and </tool_call>"}}
TEXT_OF_SAY = json.dumps(SAY)
TAGS = [
    (TEXT_OF_SAY, 1, "right"),
    (f"<tool_call>{TEXT_OF_SAY}</tool_call>", 1, "in tags"),
    (f"I say it.\n<tool_call>\n{TEXT_OF_SAY}\n</tool_call>\n", 1, "in tags after a text"),
    (f"```json\n{TEXT_OF_SAY}\n```", 1, "in a fence"),
    (f"<tool_call>{TEXT_OF_SAY}</tool_call>" * 2, 0, "called twice"),
    (f"<tool_call>{TEXT_OF_SAY}</tool_call> done", 0, "text follows"),
    (f"<tool_call>{TEXT_OF_SAY}", 0, "a tag that is closed in the text alone"),
    (f"<tool_call>{TEXT_OF_SAY} <tool_call></tool_call>", 0, "a tag in a tag"),
    (f"<tool_call>{TEXT_OF_ADD}</tool_call>", 0, "another call"),
]


def problem(answer, **metadata):
    return {"answer": answer, "entry": json.dumps({"answer": answer, "metadata": metadata})}


GYM = {
    "chain_sum": (
        problem("7"),
        [
            ("3 + 4 = 7", 1, "right"),
            ("7.0", 1, "the same value"),
            ("77", 0, "holds the right text"),
            ("7 8", 0, "a wrong answer follows the right one"),
            ("7e0", 0, "scientific notation"),
            ("٧", 0, "an Arabic digit"),
            ("", 0, "empty"),
        ],
    ),
    "base_conversion": (
        problem("1f"),
        [
            ("1f", 1, "right"),
            ("it is 1f", 0, "the package pays for any text that holds the answer, in part"),
            ("1f " * 100, 0, "repeated"),
        ],
    ),
    "countdown": (
        problem("3*4 + 1", numbers=[1, 3, 4], target=13),
        [
            ("3*4 + 1", 1, "right"),
            ("13", 0, "the target itself"),
            ("9**9**9**9", 0, "the package would compute it"),
            ("", 0, "the package pays 0.01"),
        ],
    ),
    "puzzle24": (
        problem("4*8 - 6 - 2", numbers=[4, 8, 6, 2]),
        [
            ("4*8 - 6 - 2", 1, "right"),
            ("6*4*1*1", 0, "other numbers, which the package takes"),
            ("4*(8 - 2) + 6/8", 0, "24.75, which the package rounds down"),
        ],
    ),
    "number_sorting": (
        problem("['1.0', '2.0']", direction="ascending"),
        [
            ('["1.0", "2.0"]', 1, "right"),
            ('["1.9", "1.9"]', 0, "wrong by less than 1, which the package forgives"),
            ('["nan", "nan"]', 0, "NaN, which the package takes"),
            ("[NaN, NaN]", 0, "NaN, which the package takes"),
        ],
    ),
    "game_of_life_halting": (
        problem("True"),
        [("True", 1, "right"), ("False", 0, "any text is true to the package"), ("maybe", 0, "any text")],
    ),
    "word_sorting": (
        problem("a, b", sorted_words=["a", "b"]),
        [("a, b", 1, "right"), ("a, b, c", 0, "words that follow, which the package takes")],
    ),
    "complex_arithmetic": (
        problem("1.0 + 2.0i", result=[1.0, 2.0]),
        [("1.0 + 2.0i", 1, "right"), ("nan", 0, "NaN, which the package takes"), ("1", 0, "half of it")],
    ),
    "simple_integration": (
        problem("x**2 + C", variable="x", integrand="2*x"),
        [
            ("x**2 + C", 1, "right"),
            ("x*x", 1, "right, without the constant"),
            ("Integral(2*x, x)", 0, "the question itself"),
            ("integrate(2*x, x)", 0, "the package would compute it"),
            ("x**2 + __import__('time').sleep(60)", 0, "code"),
        ],
    ),
    "string_insertion": (
        problem("ABC"),
        [("ABC", 1, "right"), ("'A' 'B' 'C'", 0, "the package would execute it"), ("exit()", 0, "code")],
    ),
}

READERS = {"chain_sum": _last_number}

RULES = {  # name -> (rule, columns, cases)
    "last_number": (REWARDS["last_number"], {"answer": "7"}, SEVEN),
    "last_number of -7": (REWARDS["last_number"], {"answer": "-7"}, MINUS_SEVEN),
    "answer of 1e-05": (REWARDS["answer"], {"answer": 1e-05}, SMALL),
    "last_number of 1000": (REWARDS["last_number"], {"answer": "1,000"}, THOUSAND),
    "answer": (REWARDS["answer"], {"answer": 7}, SEVEN),
    "last_number of 0": (REWARDS["last_number"], {"answer": "0"}, ZERO),
    "answer in text": (REWARDS["answer"], {"answer": "Paris"}, TEXT),
    "exact_match": (REWARDS["exact_match"], {"answer": "Paris"}, TEXT),
    "math": (REWARDS["math"], {"answer": r"\frac{1}{2}"}, HALF),
    "countdown": (countdown.correct, {"numbers": [1, 2, 3, 4], "target": 13}, COUNTDOWN),
    "format": (REWARDS["format"], {}, FORMAT),
    "think": (of_block(last_number), {"answer": "7"}, THINK),
    "function_call": (REWARDS["function_call"], {"answer": ADD}, CALLS),
    "function_call of tags": (REWARDS["function_call"], {"answer": SAY}, TAGS),
    **{
        f"reasoning_gym {name}": (scorer(name, "{}", READERS.get(name, _last_line)), columns, cases)
        for name, (columns, cases) in GYM.items()
    },
}
CASES = [(name, i) for name, (_, _, cases) in RULES.items() for i in range(len(cases))]


@functools.cache
def scores(name: str) -> list[float]:
    rule, columns, cases = RULES[name]
    completions = [completion for completion, _, _ in cases]
    columns = {column: [value] * len(cases) for column, value in columns.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minirl.rewards.math.SECONDS", 1.5)  # for the towers of powers
        return score({name: (1.0, rule)}, ["p"] * len(cases), completions, columns)[0]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_completion_is_worth(name, case):
    for package in ("math_verify", "reasoning_gym"):
        if name.startswith(package.removesuffix("_verify")):
            pytest.importorskip(package)
    completion, expected, why = RULES[name][2][case]
    assert scores(name)[case] == expected, f"{completion[:80]!r}: {why}"


def test_the_corpus_is_large_and_has_both_sides():
    assert len({(name, RULES[name][2][case][0]) for name, case in CASES}) >= 250
    for _, _, cases in RULES.values():
        assert {expected for _, expected, _ in cases} == {0, 1}


def test_no_other_reward_is_paid_for_silence():
    """`repetitive` and `too_short` are penalties, so 1 is what silence costs."""
    for name, answer in (
        ("answer", 7),
        ("exact_match", "x"),
        ("last_number", 0),
        ("format", ""),
        ("function_call", ADD),
    ):
        assert score({name: (1.0, REWARDS[name])}, ["p"] * 2, ["", " \n"], {"answer": [answer] * 2})[0] == [0.0, 0.0]
    for name in ("repetitive", "too_short"):
        assert score({name: (1.0, REWARDS[name])}, ["p"] * 2, ["", " \n"], {})[0] == [1.0, 1.0]
