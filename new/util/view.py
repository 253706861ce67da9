"""The live view: text on a terminal while it is written."""

import re
import shutil
import sys
import unicodedata
from contextlib import contextmanager
from itertools import groupby

DIM, GREEN, YELLOW, END = "\x1b[2m", "\x1b[92m", "\x1b[93m", "\x1b[0m"
STYLES = "", YELLOW, GREEN  # of sample.py's PROMPT, GPT, DRAFT
LEGEND = (DIM, "proposed "), (GREEN, "drafted "), (YELLOW, "the GPT's own ")


def printable(text):
    """Text without the control characters that would move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def columns(char):
    """Columns on a terminal: 2 of wide East Asian characters, 0 of marks on the one before."""
    wide = unicodedata.east_asian_width(char) in "WF"
    return 0 if unicodedata.combining(char) else 2 if wide else 1


def wrap(styled, width):
    """Lines of at most `width` columns, with escape codes, of pairs (style, text)."""
    lines, used = [""], 0
    for style, text in styled:
        lines[-1] += style
        for char in printable(text):
            if char == "\n" or used + columns(char) > width:
                lines[-1] += END
                lines.append(style)
                used = 0
            if char != "\n":
                lines[-1] += char
                used += columns(char)
        lines[-1] += END
    return lines


def pieces(step, row, decode, mask_id, least):
    """(style, text) of the last tokens of a row, `least` or more, beginning at a multiple of it, so
    that line breaks stay where they are. Of a character that takes tokens of several styles, or
    several that are proposed, this shows replacement characters; the text at the end is whole."""
    begin = max(0, len(step.rows[row]) // least - 1) * least
    tokens = zip(step.kinds[row][begin:], step.rows[row][begin:], strict=True)
    for kind, group in groupby(tokens, key=lambda pair: pair[0]):
        yield STYLES[kind], decode([token for _, token in group])
    for token in step.pending[row]:
        yield DIM, "_" if token == mask_id else decode([token])


@contextmanager
def other_screen():
    """Show the terminal's other screen, without a cursor, and leave it whatever happens."""
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def show(step, decode, mask_id):
    """Draw a `Step`: the last lines of each row, of as many rows as fit, and a line of figures."""
    size, lines = shutil.get_terminal_size(), []
    width, rows = max(1, size.columns - 1), min(len(step.rows), size.lines - 1)
    height = (size.lines - 1) // max(1, rows)
    for row in range(rows):
        lines += wrap(pieces(step, row, decode, mask_id, height * width), width)[-height:]
    lines += wrap([*LEGEND, (DIM, f"| {step}")], width)[:1]
    sys.stdout.write("\x1b[H\x1b[J" + "\n".join(lines))  # from the top left, all cleared
    sys.stdout.flush()
