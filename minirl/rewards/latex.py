r"""LaTeX around numbers as plain text: 12{,}000 is 12000, \frac{1}{2} is 1/2, 90^\circ is 90°, and 7 cm^2 is 7.

What changes the value of a number stays, and stands right beside it: \sqrt{7}, 7\pi, \frac{7}{x}.
"""

import re

SIGNS = {  # the commands that leave a number what it is, and the sign for each
    " ": r"\, \; \: \! \quad \qquad \left \right \displaystyle \small \large \Large \LARGE \huge \Huge \bf \boldsymbol",
    "¤": r"\$",  # any currency: a dollar without a backslash may begin or end a formula
    "%": r"\%",
    "\n": r"\\",
    "°": r"\degree",
    "±": r"\pm \mp \ne \neq",
    "⇒": r"\implies \Rightarrow \rightarrow \to \therefore",
    "≤": r"\le \leq \lt",
    "≥": r"\ge \geq \gt",
    "≈": r"\approx",
    "×": r"\times",
    "·": r"\cdot",
    r"\frac": r"\dfrac \tfrac",
}
SIGN_OF = {command: sign for sign, commands in SIGNS.items() for command in commands.split()}
SIGN_OF |= {"\\" + sign: sign for sign in " ()[]"}
TEXT = r"\\(?:text|math|mbox|underline|operatorname)[a-z]*\s*\{"
STEPS = [
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])(?:\\,|,?\\!)(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL), lambda command: SIGN_OF.get(command[0], command[0])),
    (re.compile(rf"{TEXT}[^{{}}\\0-9−–-]*\}}(?:\^\{{?[0-9]\}}?)?"), " "),  # also \text{cm}^2
    (re.compile(r"(?<=[0-9])[ ~](?:[A-Za-z]{1,9}/)?(?:[kcdm]?m|in|ft|yd|mi|s)\^(?:[23]|\{[23]\})(?!\w)"), " "),
    (re.compile(r"\\(?:begin|end|color)\{[^{}]*\}"), " "),
    (re.compile(rf"{TEXT}([^{{}}\\]*)\}}"), r" \1 "),
    (re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"(?:(?<=[0-9)}\]])\s*|(?<=\w))(?=\\frac)"), "±"),  # 3\frac{1}{2} is neither 31/2 nor 1/2
    (re.compile(r"\\frac\s*(?:\{\s*(-?[0-9.]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"), r"\1\2/\3\4 "),
]


def plain(text: str) -> str:
    for pattern, replacement in STEPS if "\\" in text or "{,}" in text or "^" in text else ():
        text = pattern.sub(replacement, text)
    return text
