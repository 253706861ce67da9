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
    """Text with a space for each control character but newlines: they could move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def wrap(styled, width):
    """Lines of at most `width` columns, with escape codes, of pairs (style, text)."""
    lines, used = [""], 0
    for style, text in styled:
        lines[-1] += style
        for char in printable(text):
            columns = 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if char == "\n" or used + columns > width:
                lines[-1] += END
                lines.append(style)
                used = 0
            if char != "\n":
                lines[-1] += char
                used += columns
        lines[-1] += END
    return lines


def pieces(step, row, decode, mask_id, least):
    """(style, text) of the last tokens of a row, `least` or more. The beginning jumps by `least`
    tokens, so that lines do not flow anew with each token. (A character made of several tokens may
    show as a replacement sign.)"""
    begin = max(0, len(step.rows[row]) // least - 1) * least
    tokens = zip(step.kinds[row][begin:], step.rows[row][begin:], strict=True)
    for kind, group in groupby(tokens, key=lambda pair: pair[0]):
        yield STYLES[kind], decode([token for _, token in group])
    yield from ((DIM, "_" if t == mask_id else decode([t])) for t in step.pending[row])


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
    for r in range(rows):
        lines += wrap(pieces(step, r, decode, mask_id, height * width), width)[-height:]
    lines += wrap([*LEGEND, (DIM, f"| {step}")], width)[:1]
    sys.stdout.write("\x1b[H\x1b[J" + "\n".join(lines))  # from the top left, all cleared
    sys.stdout.flush()
