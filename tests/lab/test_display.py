"""The display on a terminal and without one, with a clock that the test moves."""

import io
import re
from types import SimpleNamespace

import pytest
from helpers import Terminal
from rich.console import Console

from minirl.lab.display import RichDisplay, print_table
from minirl.run import Display

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Clock:
    """Time stands still until a test says otherwise."""

    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def console(file: io.StringIO, width: int = 80, **environ) -> Console:
    return Console(file=file, width=width, height=24, _environ={"TERM": "xterm", **environ})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(clock) -> RichDisplay:
    return RichDisplay(console(Terminal()), clock)


@pytest.fixture
def plain(clock) -> RichDisplay:
    return RichDisplay(console(io.StringIO()), clock)


def written(display: RichDisplay) -> str:
    return display.console.file.getvalue()


def bars(display: RichDisplay) -> list[str]:
    """What the bars show now, a line each."""
    screen = console(Terminal(), 120)
    screen.print(display.bars.get_renderable())
    lines = re.sub(r"\x1b\[[\d;?]*\w", "", screen.file.getvalue()).splitlines()
    return [line.rstrip() for line in lines if line.strip()]


# ---- terminal --------------------------------------------------------------------------------------------------------


def test_a_bar_shows_done_total_elapsed_and_the_time_to_go(terminal, clock):
    with terminal:
        terminal.progress("step", 0, 50)
        assert re.fullmatch(r"step ━+ +0/50 0:00:00  ETA -:--:--", bars(terminal)[0])
        clock.time += 60
        terminal.progress("step", 10, 50)
        assert re.fullmatch(r"step ━.* 10/50 0:01:00  ETA 0:04:00", bars(terminal)[0])
        clock.time += 30  # nothing new: the time to go runs down
        assert bars(terminal)[0].endswith("10/50 0:01:30  ETA 0:03:30")


def test_the_time_to_go_of_a_resumed_run_counts_from_where_it_went_on(terminal, clock):
    with terminal:
        terminal.progress("step", 40, 50)
        clock.time += 20
        terminal.progress("step", 42, 50)
        assert bars(terminal)[0].endswith("42/50 0:00:20  ETA 0:01:20")


def test_inner_stages_stand_under_the_outer_one_and_vanish_when_done(terminal):
    with terminal:
        terminal.progress("step", 1, 3)
        terminal.progress("rollout", 0, 8)
        assert [line.split("━")[0] for line in bars(terminal)] == ["step      ", "  rollout "]
        terminal.progress("rollout", 8, 8)
        terminal.progress("evaluation", 5, 9)
        assert [line.split("━")[0] for line in bars(terminal)] == ["step         ", "  evaluation "]
        terminal.progress("evaluation", 9, 9)
        terminal.progress("step", 3, 3)
        assert bars(terminal) == []


def test_a_stage_that_starts_again_starts_from_nothing(terminal, clock):
    with terminal:
        terminal.progress("sft", 0, 10)
        clock.time += 9
        terminal.progress("sft", 6, 10)
        terminal.progress("sft", 1, 20)
        assert len(bars(terminal)) == 1 and bars(terminal)[0].endswith("1/20 0:00:00  ETA -:--:--")


def test_brackets_and_emoji_names_are_text(terminal):
    with terminal:
        terminal.progress("[bold]stage", 1, 2)
        terminal.line("[red]no colour[/red] :smile: [/] 42")
        assert bars(terminal)[0].startswith("[bold]stage ━")
    assert "[red]no colour[/red] :smile: [/] 42\n" in written(terminal)


def test_a_long_line_is_left_to_the_terminal_to_wrap(terminal):
    long = "word " * 60
    with terminal:
        terminal.progress("step", 1, 2)
        terminal.line(long)
    assert long in written(terminal)


def test_lines_are_written_while_the_bars_run(terminal):
    with terminal:
        terminal.progress("step", 1, 2)
        terminal.line("step 1/2")
        assert "step 1/2\n" in written(terminal)


def test_escape_codes_of_a_completion_do_not_reach_the_terminal(terminal, plain):
    for display in (terminal, plain):
        display.line("\x1b[2Jgone\x1b]0;title\x07")
        assert "\x1b[2J" not in written(display) and "\x1b]0" not in written(display)
        assert "[2Jgone" in written(display)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_cursor_comes_back_after_an_error(terminal, error):
    with pytest.raises(error), terminal:
        terminal.progress("step", 1, 2)
        raise error
    assert written(terminal).count(HIDE) == written(terminal).count(SHOW) == 1
    assert written(terminal).rindex(SHOW) > written(terminal).rindex(HIDE)


# ---- no terminal -----------------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_are_plain_and_whole(plain, capsys):
    with plain:
        plain.progress("step", 1, 2)
        plain.line("[red]reward[/red] " + "x" * 200)
    assert written(plain) == "[red]reward[/red] " + "x" * 200 + "\n"
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_progress_is_a_line_every_ten_seconds_on_stderr(plain, clock, capsys):
    with plain:
        for second in range(0, 31):
            plain.progress("rollout", second, 100)
            clock.time += 1
    assert capsys.readouterr().err.splitlines() == [
        "rollout 2/100  0:00:02  ETA 0:01:38",
        "rollout 12/100  0:00:12  ETA 0:01:28",
        "rollout 22/100  0:00:22  ETA 0:01:18",
    ]
    assert written(plain) == ""


def test_without_a_terminal_nested_stages_share_a_line(plain, clock, capsys):
    plain.progress("step", 3, 10)
    for done in range(3):
        plain.progress("rollout", done, 8)
        clock.time += 1.5
    plain.progress("rollout", 2, 8)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 3/10  ") and "  |  rollout 2/8  0:00:03  ETA " in line


def test_short_stages_say_nothing(plain, clock, capsys):
    for _ in range(20):
        for done in range(4):
            plain.progress("rollout", done, 3)
            clock.time += 0.4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("environ", [{"FORCE_COLOR": "1"}, {"TERM": "dumb"}])
def test_forced_colours_and_dumb_terminals_get_plain_lines(clock, environ):
    file = Terminal() if "TERM" in environ else io.StringIO()
    display = RichDisplay(console(file, **environ), clock)
    with display:
        display.progress("step", 1, 2)
        display.line("[a]")
    assert written(display) == "[a]\n"


def test_it_takes_the_place_of_the_plain_display():
    assert issubclass(RichDisplay, Display)
    assert not RichDisplay(console(io.StringIO())).live and RichDisplay(console(Terminal())).live


# ---- tables ----------------------------------------------------------------------------------------------------------

ROWS = [("mean@8 [b]", 0.41234, "0.38 to 0.45"), ("greedy", None, "[/]")]


def test_a_table_on_a_terminal_has_a_frame_and_keeps_brackets():
    screen = console(Terminal())
    print_table("held-out [x]", ("accuracy", "value", "interval"), ROWS, screen)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", screen.file.getvalue())
    assert "held-out [x]" in shown and "│ mean@8 [b] │ 0.4123 │" in shown and "│ greedy     │      – │ [/]" in shown


def test_a_table_without_a_terminal_is_aligned_text_of_any_width():
    file = io.StringIO()
    print_table("t", ("accuracy", "value", "note"), [*ROWS, ("long", 12, "y" * 300)], console(file, FORCE_COLOR="1"))
    title, head, first, second, third = (line.rstrip() for line in file.getvalue().splitlines())
    assert title == "t" and head.split() == ["accuracy", "value", "note"]
    assert first.split() == ["mean@8", "[b]", "0.4123", "0.38", "to", "0.45"] and "\x1b" not in file.getvalue()
    assert first.index("0.4123") + 6 == second.index("–") + 1 == third.index("12") + 2  # numbers to the right
    assert third.endswith("y" * 300)


@pytest.mark.parametrize("live", [True, False])
def test_no_control_character_reaches_a_terminal_but_line_ends_and_tabs(live):
    """Of ECMA-48 the sets C0 and C1, and DEL: a bell rings, a carriage return writes over what was said."""
    file = io.StringIO()
    file.isatty = lambda: live
    display = RichDisplay(Console(file=file, color_system=None, width=200, force_terminal=live))
    controls = [*range(0x20), *range(0x7F, 0xA0)]
    display.line("".join(f"<{chr(code)}>" for code in controls if code != 10))
    letters = SimpleNamespace(decode=lambda tokens, **options: "\a\r\x9c"[: len(tokens)])
    display.example(letters, [0], [0, 0])
    written = file.getvalue()
    assert not {ord(letter) for letter in written} & set(controls) - {9, 10}
    assert "<␇>" in written and "<␍>" in written
