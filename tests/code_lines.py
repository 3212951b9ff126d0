"""Count lines of code, without blank lines, comments and docstrings.

python tests/code_lines.py              # by room
python tests/code_lines.py README.md    # bring the table of files in the README up to date
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {
    "engine": [*ROOT.glob("minirl/*.py")],
    "lab": [*ROOT.glob("minirl/lab/**/*.py")],
    "judge": [*ROOT.glob("minirl/judge/**/*.py")],
    "kernels": [*ROOT.glob("kernels/*.py")],
}
COUNTED = re.compile(r"(?<=\| \[`)(\S+)(`\]\(\S+\) \| )([\d,]+)(?= \|)")  # a table's row: file, lines
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(file: Path, *functions: str) -> int:
    """Count the code lines of a file, or of some of its functions alone."""
    source = file.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a statement that is a text: the docstring of a module, function or field
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    named = [node for node in ast.parse(source).body if getattr(node, "name", None) in functions]
    return len(lines & {i for n in named for i in range(n.lineno, n.end_lineno + 1)} if functions else lines)


def counted_anew(page: str) -> str:
    return COUNTED.sub(lambda row: f"{row[1]}{row[2]}{code_lines(ROOT / row[1]):,}", page)


def closure(module: str) -> list[Path]:
    """List the files that importing a module pulls in, without kernels/ and the package's lazy __init__."""
    script = (
        f"import sys, {module}; print(*(getattr(m, '__file__', None) or '' for m in sys.modules.values()), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return sorted(
        {ROOT / line for line in done.stdout.split("\n")} & set(ROOMS["engine"]) - {ROOT / "minirl/__init__.py"}
    )


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(counted_anew(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
    for room, files in ROOMS.items():
        print(f"{sum(map(code_lines, files)):6,} {room}")
    pulled = closure("minirl.grpo")
    print(f"{sum(map(code_lines, pulled)):6,} in the {len(pulled)} files that importing minirl/grpo.py pulls in")
