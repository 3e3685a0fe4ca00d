"""Progress bars, tables and number formatting. Progress goes to stderr, never to stdout."""

import io

import pytest

from lm import terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.25, "0.25 s"),
        (9.9, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1m 00s"),
        (125, "2m 05s"),
        (3599.7, "1h 00m"),
        (7_384, "2h 03m"),
        (200_000, "2d 07h"),
    ],
)
def test_duration_formats_seconds(seconds, text):
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (950, "950"), (999.6, "1k"), (12_345, "12.3k"), (1.3e6, "1.3M"),
     (355e6, "355M"), (999_600_000, "1B"), (2.5e12, "2.5T"), (-1500, "-1.5k"), (5e18, "5000P")],
)  # fmt: skip
def test_number_formats_with_magnitude_suffix(value, text):
    assert terminal.number(value) == text


def test_sizes_and_rates_have_units():
    assert terminal.size(1.2e9) == "1.2 GB"
    assert terminal.size(999) == "999 B"
    assert terminal.flops(1.5e11) == "150 GFLOP/s"


def test_table_right_aligns_numbers_without_trailing_spaces():
    text = terminal.table(("weight", "count"), [("embed", 12), ("blocks/ffn", 3_456)])
    assert text.splitlines() == [
        "weight      count",
        "----------  -----",
        "embed          12",
        "blocks/ffn   3456",
    ]
    assert terminal.table(("a",), []) == "a\n-"
    with pytest.raises(ValueError, match="length"):
        terminal.table(("a", "b"), [(1,)])


def test_progress_without_terminal_writes_plain_lines_to_stderr(capsys):
    with terminal.progress("Reading", total=1_000) as bar:
        for _ in range(1_000):
            bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Reading: 1k of 1k in ")
    assert err.count("\n") == 1
    assert "\r" not in err
    assert "\x1b" not in err


def test_plain_progress_lines_are_rate_limited_and_show_time_left(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress("Reading", total=10) as bar:
        for _ in range(10):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reading: 3 of 10, 28 s left"
    assert len(lines) == 4


def test_progress_with_unknown_total_and_with_error_inside(capsys):
    with pytest.raises(KeyError), terminal.progress("Reading") as bar:
        bar.advance(5)
        raise KeyError
    # After an error, the final line is not written.
    assert capsys.readouterr().err == ""
    with terminal.progress("Reading") as bar:
        bar.advance(5)
    assert capsys.readouterr().err.startswith("Reading: 5 in ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_terminal_draws_bar_with_notes_above_it(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    with terminal.progress("Training", total=4) as bar:
        bar.advance(4)
        terminal.note("step 4")
    assert "\r" in screen.getvalue()
    assert "100%" in screen.getvalue()
    assert "\nstep 4\n" in screen.getvalue().replace("\r", "\n")
    assert capsys.readouterr().out == ""


def test_progress_bar_starts_at_initial_step_and_shows_given_time_left(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    with terminal.progress("training", 4_000, "steps", initial=1_233) as bar:
        assert "1233/4000" in screen.getvalue() and "? left" in screen.getvalue()
        bar._bar.mininterval = 0
        bar.advance(1, 134.0)
    assert "1234/4000" in screen.getvalue() and "2m 14s left" in screen.getvalue()


def test_indent_skips_empty_lines():
    assert terminal.indent("a\n\n  b") == "    a\n\n      b"
