"""The terminal: text while it is written, a progress line, and bars."""

import re
import shutil
import sys
import time
import unicodedata
from itertools import pairwise

PLAIN, DIM, BRIGHT, OWN = "", "\x1b[2m", "\x1b[1;92m", "\x1b[1;93m"


def columns(text):
    """Terminal columns of a string: wide East Asian characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def printable(text):
    """Text without the control characters that would move the cursor."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def wrap(pieces, width):
    """[(style, text)] -> lines of at most `width` columns, as lists of (style, character)."""
    lines, used = [[]], 0
    for style, text in pieces:
        for char in printable(text):
            size = 1 if char.isascii() else columns(char)
            if char == "\n" or used + size > width:
                lines.append([])
                used = 0
            if char != "\n":
                lines[-1].append((style, char))
                used += size
    return lines


def styled(line):
    """A line's characters as one string, with an escape code wherever the style changes."""
    out, now = [], PLAIN
    for style, char in line:
        if style != now:
            out.append("\x1b[0m" + style)
            now = style
        out.append(char)
    return "".join(out) + ("\x1b[0m" if now else "")


class Display:
    """Shows the end of every sample while it is written: masks and drafts dim, new tokens bright
    green, settled text plain; in mode verify accepted drafts green and the GPT level's own tokens,
    of which most stand where a draft was refused, yellow. Below, a line says what that cost.

    It draws on the terminal's alternate screen: a resized window or the echo of Ctrl-C leaves
    nothing behind, and on leaving the old screen and the cursor return, whatever happened.
    """

    def __init__(self, tokenizer, mask_id, out=None):
        self.tokenizer, self.mask_id, self.out = tokenizer, mask_id, out or sys.stdout
        self.prompts = 0  # tokens of all prompts together
        encoding = (self.out.encoding or "").lower().replace("-", "")
        self.glyph = "\u2591" if encoding.startswith("utf") else "_"

    def __enter__(self):
        self.out.write("\x1b[?1049h\x1b[?25l")
        return self

    def __exit__(self, *_):
        self.out.write("\x1b[?25h\x1b[?1049l")
        self.out.flush()

    def pieces(self, step, row, room=sys.maxsize):
        """[(style, text)] of one row: its last `room` tokens or more, then what is in the making.

        The cut moves by whole rooms, so that lines do not break anew with every token.
        """
        start, settled = int(step.start[row]), int(step.settled[row])
        end = min(start, settled)
        cut = max(0, end - room) // room * room
        out = [(PLAIN, self.tokenizer.decode(step.text[row, cut:end].tolist()))]
        shown = settled - end if step.done[row] else step.block.shape[1]
        if step.drafts is not None:
            shown = min(shown, int(step.accepted[row]) + 1)
        inside, new = step.block[row, :shown].tolist(), step.new[row, :shown].tolist()
        for i, (token, fresh) in enumerate(zip(inside, new, strict=True)):
            if token == self.mask_id:
                out.append((DIM, self.glyph))
                continue
            own = step.drafts is not None and i == step.accepted[row]
            style = OWN if own else BRIGHT if fresh else PLAIN
            out.append((style, self.tokenizer.token_text(token)))
        if step.drafts is not None and not step.done[row]:
            out += [(DIM, self.glyph if t == self.mask_id else self.tokenizer.token_text(t))
                    for t in step.drafts[row].tolist()]
        return out

    def caption(self, step):
        """[(style, text)] of one line: passes so far, tokens a pass, and in mode verify colours."""
        if not step.nfe:
            self.prompts = int(step.settled.sum())
        rate = (int(step.settled.sum()) - self.prompts) / max(1, step.nfe)
        out = [(DIM, f"{step.nfe} passes, {rate:.2f} tokens a pass")]
        if step.drafts is not None:
            out += [(DIM, " | "), (BRIGHT, "accepted"), (PLAIN, " "), (OWN, "the GPT's own"),
                    (DIM, " draft")]
        return out

    def show(self, step):
        size = shutil.get_terminal_size()
        width, below = max(1, size.columns - 1), int(size.lines > 3)
        room = size.lines - below
        rows = min(len(step.text), room)  # of more samples than lines, the first
        height, lines = room // rows, []
        for row in range(rows):
            lines += wrap(self.pieces(step, row, height * width), width)[-height:]
        lines += wrap(self.caption(step), width)[:below]
        frame = "\x1b[H\x1b[J" + "\n".join(styled(line) for line in lines)
        self.out.write("\x1b[?2026h" + frame + "\x1b[?2026l")  # drawn at once where supported
        self.out.flush()


class Progress:
    """One line on stderr, `label  43% | 12.1 M/s | eta 2.1m`; silent when it is no terminal."""

    def __init__(self, label, total, unit="B"):
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.first, self.start, self.shown_at, self.done = None, 0.0, 0.0, 0
        self.visible = sys.stderr.isatty()

    def update(self, done):
        """done: how many of `total` units; the rate counts from the first call on."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.start, self.shown_at = done, now, now
        if not self.visible or now - self.shown_at < 0.2:
            return
        self.shown_at = now
        rate = (done - self.first) / (now - self.start)
        left = (self.total - done) / max(rate, 1e-9)
        eta = f"{left:.0f}s" if left < 100 else f"{left / 60:.1f}m"
        rate = f"{rate / 1e6:.1f} M" if rate > 1e5 else f"{rate / 1e3:.1f} k"
        print(f"\r{self.label} {done / self.total:4.0%} | {rate}{self.unit}/s | "
              f"eta {eta}\033[K", end="", file=sys.stderr, flush=True)

    def advance(self, more):
        """`more` units are done; with the last of them the line is cleared."""
        self.done += more
        self.close() if self.done >= self.total else self.update(self.done)

    def close(self):
        """Clear the line."""
        if self.visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def chart(total, count, most=16):
    """Bars of the mean loss given k masked, from sums and counts (S,) of blocks by k = 1..S."""
    S = len(count)
    edges = [S * i // min(S, most) for i in range(min(S, most) + 1)]
    bars = [(a, b, (total[a:b].sum() / count[a:b].sum()).item())
            for a, b in pairwise(edges) if count[a:b].sum()]
    longest = max(mean for *_, mean in bars) or 1.0
    lines = [f"nats per masked token when k of {S} are masked; their mean is the bound"]
    for a, b, mean in bars:
        label = f"{b}" if b == a + 1 else f"{a + 1}-{b}"
        lines.append(f"{label:>9s}  {mean:.3f}  " + "#" * round(50 * mean / longest))
    return "\n".join(lines)
