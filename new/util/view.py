"""The live view: text on a terminal while it is written."""

import re
import shutil
import sys
import unicodedata
from itertools import groupby

DIM, GREEN, YELLOW, END = "\x1b[2m", "\x1b[92m", "\x1b[93m", "\x1b[0m"
STYLES = "", YELLOW, GREEN  # of sample.py's PROMPT, GPT, DRAFT
LEGEND = (DIM, " | draft "), (GREEN, "accepted "), (YELLOW, "the GPT level's own")


def printable(text):
    """Text without the control characters that would move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def columns(char):
    """Columns on a terminal: 2 of wide East Asian characters, 0 of marks on the one before."""
    wide = unicodedata.east_asian_width(char) in "WF"
    return 0 if unicodedata.combining(char) else 2 if wide else 1


def wrap(pieces, width):
    """Lines of at most `width` columns, with escape codes, of pieces (style, text)."""
    lines, used = [""], 0
    for style, text in pieces:
        lines[-1] += style
        for char in printable(text):
            size = 1 if char.isascii() else columns(char)
            if char == "\n" or used + size > width:
                lines[-1] += END
                lines.append(style)
                used = 0
            if char != "\n":
                lines[-1] += char
                used += size
        lines[-1] += END
    return lines


class View:
    """Frames on the terminal's other screen, which vanishes at the end, whatever ends it."""

    def __init__(self, tokenizer, mask_id):
        self.decode, self.mask_id = tokenizer.decode, mask_id

    def __enter__(self):
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_):
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()

    def pieces(self, step, row, most):
        """(style, text) of a row's last tokens, `most` or more: from a multiple of `most` on, so
        that not every token breaks all lines anew."""
        begin = max(0, len(step.rows[row]) // most - 1) * most
        tokens = zip(step.kinds[row][begin:], step.rows[row][begin:], strict=True)
        for kind, group in groupby(tokens, key=lambda pair: pair[0]):
            yield STYLES[kind], self.decode([token for _, token in group])
        for masked, group in groupby(step.pending[row], key=lambda token: token == self.mask_id):
            tokens = [*group]
            yield DIM, "_" * len(tokens) if masked else self.decode(tokens)

    def show(self, step):
        """Draw a `Step`: the end of each row, of as many as there are lines, and its figures."""
        size, lines = shutil.get_terminal_size(), []
        width, rows = size.columns - 1, min(len(step.rows), size.lines - 1)
        height = (size.lines - 1) // max(1, rows)
        for row in range(rows):
            lines += wrap(self.pieces(step, row, height * width), width)[-height:]
        lines += wrap([(DIM, str(step)), *LEGEND], width)[:1]
        sys.stdout.write("\x1b[H\x1b[J" + "\n".join(lines))
        sys.stdout.flush()
