"""The live view: text on a terminal while it is written."""

import re
import shutil
import sys
import unicodedata
from itertools import groupby

PLAIN, DIM, GREEN, YELLOW = "", "\x1b[2m", "\x1b[92m", "\x1b[93m"
STYLES = PLAIN, YELLOW, GREEN  # of sample.py's kinds: PROMPT, GPT, DRAFT
LEGEND = (DIM, " | draft "), (GREEN, "accepted "), (YELLOW, "the GPT level's own")


def printable(text):
    """Text without the control characters that would move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def wrap(pieces, width):
    """The lines, at most `width` columns wide, of pieces (style, text), with their escape codes.
    Wide East Asian characters take two columns, combining marks none."""
    lines, used = [""], 0
    for style, text in pieces:
        lines[-1] += style
        for char in printable(text):
            columns = 1
            if not char.isascii():
                wide = unicodedata.east_asian_width(char) in "WF"
                columns = 0 if unicodedata.combining(char) else 2 if wide else 1
            if char == "\n" or used + columns > width:
                lines[-1] += "\x1b[0m"
                lines.append(style)
                used = 0
            if char != "\n":
                lines[-1] += char
                used += columns
        lines[-1] += "\x1b[0m"
    return lines


class View:
    """On the terminal's other screen, which Ctrl-C, too, leaves as if nothing had been there."""

    def __init__(self, tokenizer, mask_id):
        self.tokenizer, self.mask_id = tokenizer, mask_id

    def __enter__(self):
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_):
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()

    def pieces(self, step, row, most):
        """(style, text) of a row's last tokens, `most` or more. They begin at a multiple of it, so
        that lines do not break anew with every token."""
        begin = max(0, len(step.rows[row]) // most - 1) * most
        tokens = zip(step.kinds[row][begin:], step.rows[row][begin:], strict=True)
        for kind, group in groupby(tokens, key=lambda pair: pair[0]):
            yield STYLES[kind], self.tokenizer.decode([token for _, token in group])
        for masked, group in groupby(step.pending[row], key=lambda token: token == self.mask_id):
            group = [*group]
            yield DIM, "_" * len(group) if masked else self.tokenizer.decode(group)

    def show(self, step):
        size, lines = shutil.get_terminal_size(), []
        shown = min(len(step.rows), max(1, size.lines - 1))  # of more rows than lines, the first
        height = max(1, (size.lines - 1) // shown)
        for row in range(shown):
            pieces = self.pieces(step, row, height * size.columns)
            lines += wrap(pieces, size.columns - 1)[-height:]
        lines += wrap([(DIM, str(step)), *LEGEND], size.columns - 1)[:1]
        sys.stdout.write("\x1b[H\x1b[J" + "\n".join(lines))
        sys.stdout.flush()
