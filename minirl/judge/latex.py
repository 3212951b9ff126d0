r"""Turn LaTeX around numbers into plain text: 12{,}000 into 12000, \frac{1}{2} into 1/2, 90^\circ into 90°, and
7 cm^2 into 7.

Whatever changes the value of a number is kept directly beside it: \sqrt{7}, 7\pi, \frac{7}{x}, 7 \text{ million}.
"""

import re

SIGNS = {  # sign -> the commands that it replaces; none of them changes the value of a number
    " ": r"\, \; \: \! \quad \qquad \left \right \displaystyle \small \large \Large \LARGE \huge \Huge \bf \boldsymbol",
    "¤": r"\$",  # for any currency, as a dollar without a backslash may begin or end a formula
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
PARTS = (
    r"hal(?:f|ves)|quarters?|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?"
)
POWERS = r"(?:hundred|thousand|(?:m|b|tr)illion|lakh|crore)s?|dozens?|[mb]n"
CHANGED_BEFORE = re.compile(  # words that change the value of the number behind them
    rf"""\b(?: minus | negative | not | twice | thrice | double | triple | mod(?:ulo)? | choose | divided[ ]by
    | (?:[0-9]|\bx)[ ]over | (?:{POWERS})(?:[ ]and)? | (?:{PARTS}|%|percent|power|roots?|squared?|cubed?|factorial)[ ]of
    | (?<!%)(?:square|cube)[ ]root | root | power ) \s+ (?:the\s+)? [*$€£¥¤({{\s]* $""",
    re.VERBOSE | re.IGNORECASE,
)
CHANGED_AFTER = re.compile(  # words that change the value of the number before them; 7 cm squared is 7
    rf"""[ \t}}$*()~-]* (?: (?:[A-Za-z]+\s+)? and\s+(?:an?|one|two|three)\s+(?:{PARTS})\b | (?:and\s+)?[¼½¾⅐-⅞]
    | (?: (?:an?|one)\s+)? (?: {POWERS} | {PARTS} | squared | cubed | factorial | minus | negative | mod(?:ulo)? | log
    | sqrt | root | choose | divided | to\s+the\s+(?:power|[0-9]\w*|[a-z]+th) | percent\s+off | %\s*off )\b
    | (?:[A-Za-z°]+\s+){{0,2}} below\b )""",
    re.VERBOSE | re.IGNORECASE,
)
CHANGING = (
    rf"\b(?:{POWERS}|{PARTS}|squared|cubed|factorial|minus|negative|not|or|and|mod(?:ulo)?|below|off|twice|double"
    r"|triple|thrice|root|log|sqrt|choose|divided|power)\b"
)
TEXT = r"\\(?:text|math|mbox|underline|operatorname)[a-z]*\s*\{"
REWRITES = [  # (pattern, replacement), applied in this order
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])(?:\\,|,?\\!)(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL), lambda command: SIGN_OF.get(command[0], command[0])),
    (re.compile(rf"{TEXT}(?![^{{}}]*(?i:{CHANGING}))[^{{}}\\0-9−–-]*\}}(?:\^\{{?[0-9]\}}?)?"), " "),  # also \text{cm}^2
    (re.compile(r"(?<=[0-9])[ ~](?:[A-Za-z]{1,9}/)?(?:[kcdm]?m|in|ft|yd|mi|s)\^(?:[23]|\{[23]\})(?!\w)"), " "),
    (re.compile(r"\\(?:begin|end|color)\{[^{}]*\}"), " "),
    (re.compile(rf"{TEXT}([^{{}}\\]*)\}}"), r" \1 "),
    (re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"(?:(?<=[0-9)}\]])\s*|(?<=\w))(?=\\frac)"), "±"),  # 3\frac{1}{2} is neither 31/2 nor 1/2
    (re.compile(r"\\frac\s*(?:\{\s*(-?[0-9.]+)\s*\}|([0-9]))\s*(?:\{\s*([0-9]+)\s*\}|([0-9]))"), r"\1\2/\3\4 "),
]


def to_plain_text(text: str) -> str:
    """Rewrite LaTeX around numbers; text without it stays as it is, which is most of it and must cost nothing."""
    for pattern, replacement in REWRITES if "\\" in text or "{,}" in text or "^" in text else ():
        text = pattern.sub(replacement, text)
    return text
