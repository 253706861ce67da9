"""The terminal: the live view on screens of every size, on a real pseudo terminal, and in pipes."""

import functools
import math
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from unittest import mock

import sample
from tests.common import CHARS, HERE, Skip, checkpoint_folder, tiny_model
from util.dataset import CharTokenizer
from util.display import BRIGHT, DIM, OWN, PLAIN, Display, columns, printable, wrap

CODE = r"\x1b\[[?0-9;]*[A-Za-z]"


def cells_of(frame):
    """The lines of a frame as the terminal shows them: [[(style, character)]]."""
    head, style, lines = "\x1b[?2026h\x1b[H\x1b[J", PLAIN, [[]]
    assert frame.startswith(head) and frame.endswith("\x1b[?2026l"), frame
    for code, char in re.findall(rf"({CODE})|([\s\S])", frame[len(head) : -len("\x1b[?2026l")]):
        style = style if char else "" if code == "\x1b[0m" else style + code
        assert char == "\n" or not char or char.isprintable(), f"control character {char!r}"
        if char == "\n":
            lines.append([])
        elif char:
            lines[-1].append((style, char))
    assert not style, "a style is left behind"
    return lines


def pictured(step, row, tokenizer, mask_id):
    """[(style, character)] of a row as the docstring of `Display` promises it; blanks left out."""
    start, accepted = int(step.start[row]), 0
    kinds = [(PLAIN, t) for t in step.text[row, : min(start, int(step.settled[row]))].tolist()]
    block, new = step.block[row].tolist(), step.new[row].tolist()
    if step.drafts is None:
        kinds += [(BRIGHT if n else PLAIN, t) for t, n in zip(block, new, strict=True)]
    else:
        accepted = int(step.accepted[row])
        kinds += [(BRIGHT, t) for t in block[:accepted]] + [(OWN, block[accepted])]
        kinds += [(DIM, t) for t in step.drafts[row].tolist()]
    cells = [(DIM, "\N{LIGHT SHADE}") if t == mask_id else (style, tokenizer.chars[t])
             for style, t in kinds]
    return [(style, char) for style, char in cells if printable(char).strip()]


def test_display():
    """Every frame on small terminals, all modes: the end of the text and what is in the making and
    nothing else, each token in its colour, below it what that cost, and no line more than fits."""
    chars = CHARS + "\N{CJK UNIFIED IDEOGRAPH-6F22}\N{CJK UNIFIED IDEOGRAPH-5B57}\t\x1b\x9b"
    net = tiny_model(vocab_size=len(chars), seq_len=28, block_size=4, n_layer=1)
    tokenizer, mask_id, frames = CharTokenizer(chars), net.config.mask_id, 0
    seen, undrafted = Counter(), 0
    for (width, height, samples, new), mode in (
        ((20, 6, 1, 150), "verify"), ((7, 5, 1, 99), "block"), ((2, 3, 1, 20), "verify"),
        ((80, 24, 1, 60), "gpt"), ((80, 24, 2, 60), "verify"), ((80, 24, 2, 60), "block"),
        ((9, 6, 9, 20), "block"),
    ):
        out, below = mock.Mock(encoding="utf-8"), int(height > 3)
        stream = sample.generate_stream(net, [[1, 2, 3]] * samples, new, mode=mode, branches=2,
                                        steps=2 * (mode == "block"))
        size = mock.Mock(return_value=os.terminal_size((width, height)))
        with mock.patch("shutil.get_terminal_size", size):
            display = Display(tokenizer, mask_id, out)
            for step in stream:
                display.show(step)
                lines = cells_of(out.write.call_args.args[0])
                frames += 1
                undrafted += step.drafts is not None and bool((step.drafts == mask_id).all())
                used = max(sum(columns(char) for _, char in line) for line in lines)
                assert len(lines) <= height and used < width, (used, width, height)
                made = int(step.settled.sum()) - 3 * samples
                said = f"{step.nfe} passes, {made / max(1, step.nfe):.2f} tokens a pass"
                shown = "".join(char for _, char in lines.pop()) if below else said
                assert shown.startswith(said[: width - 1]), (shown, said)
                if step.done.any() or samples > 2:
                    continue
                cells = [c for line in lines for c in line if c[1].strip()]
                want = [c for r in range(samples) for c in pictured(step, r, tokenizer, mask_id)]
                assert cells == (want if width == 80 else want[len(want) - len(cells) :]), want
                assert len(want) == len(cells) or len(lines) == height - below, "room is left"
                seen.update(style for style, _ in cells)
    for width in range(2, 9):  # a wide character may leave a column free, never take one too many
        wrapped = wrap([(PLAIN, printable(chars[1:] * 3))], width)
        assert "".join(c for line in wrapped for _, c in line) == printable(chars[1:] * 3)
        used = {sum(columns(char) for _, char in line) for line in wrapped[:-1]}
        assert used <= {width - 1, width}, (width, used)
    counts = [seen[style] for style in (PLAIN, DIM, BRIGHT, OWN)]
    assert min(undrafted, *counts) > 20, f"too few to tell: {counts}, {undrafted}"
    return f"{frames} frames; plain, dim, green, yellow cells: {counts}"


def on_a_terminal(width, height, *arguments):
    """sample.py as a process on a pseudo terminal: (its id, the other end, resize(width, height)).
    Skip where there is no such thing."""
    try:
        import fcntl
        import pty
        import termios
    except ImportError:
        raise Skip("no pseudo terminals here") from None

    def resize(width, height):
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    pid, end = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else inherited as ignored in the background
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        env |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, f"{HERE}/sample.py", *arguments], env)
    resize(width, height)
    return pid, end, resize


def read_terminal(end, frames=math.inf, limit=90.0):
    """What the process writes, to its end or for so many frames."""
    data, stop = b"", time.monotonic() + limit
    while time.monotonic() < stop and data.count(b"\x1b[?2026l") < frames:
        if select.select([end], [], [], 0.1)[0]:
            try:
                data += os.read(end, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
    return data.decode()


def test_sample_on_a_terminal():
    """The command on a real pseudo terminal: to its end, and interrupted after a resize. Both leave
    the screen and the cursor as they were, and below the text what it cost."""
    report = r"(\d+) tokens in (\d+) passes = \d.\d\d a pass, \d+ tokens/s in float32"
    with checkpoint_folder(CHARS + "\x07\x1b") as (folder, net, tokenizer):
        how = [f"--out_dir={folder}", "--prompt=hello", "--max_new_tokens=120", "--temperature=1",
               "--device=cpu"]
        *_, last = sample.generate_stream(net, [tokenizer.encode("hello")], 120)
        text = tokenizer.decode(last.rows()[0])
        assert "\x1b" in text and "\x07" in text, "the model must write what would harm a terminal"
        runs = [on_a_terminal(60, 12, *how), on_a_terminal(60, 12, *how, "--delay=0.02")]
        _, end, resize = runs[1]
        seen = ["", read_terminal(end, frames=12)]
        resize(17, 6)
        seen[1] += read_terminal(end, frames=8)
        os.write(end, b"\x03")
        for i, ((pid, end, _), wanted) in enumerate(zip(runs, (0, 130), strict=True)):
            seen[i] += read_terminal(end)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(end)
            assert code == wanted, f"exit code {code}"
            for on, off in (("\x1b[?25l", "\x1b[?25h"), ("\x1b[?1049h", "\x1b[?1049l")):
                assert seen[i].count(on) == 1 == seen[i].count(off), (on, off)
            after = seen[i].partition("\x1b[?1049l")[2].replace("\r\n", "\n")
            written, _, said = re.sub(CODE, "", after).removesuffix("\n").rpartition("\n")
            found = re.fullmatch(report, said)
            assert printable(text).startswith(written), (text, written)
            assert int(found[1]) == len(written) - 5 and (code or len(written) == 125), said
            assert code or int(found[2]) == last.nfe, said
        assert 8 < len(written) < 120 and all(style in seen[0] for style in (DIM, BRIGHT, OWN))
    return f"125 characters to the end; {len(written)} at Ctrl-C, exit code 130"


def test_sample_in_a_pipe():
    """The command as a process: standard input to standard output without an escape code, and a
    reader that leaves early is no error to speak of."""
    with checkpoint_folder() as (folder, net, tokenizer):
        run = functools.partial(
            subprocess.run, [sys.executable, f"{HERE}/sample.py", "--out_dir=.", "--prompt=-",
                             "--max_new_tokens=50", "--temperature=1", "--device=cpu"],
            input="caf\xe9\n".encode(), stderr=subprocess.PIPE, check=False, cwd=folder,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        done = run(stdout=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        text = tokenizer.decode(sample.generate(net, [tokenizer.encode("caf\xe9\n")], 50)[0])
        assert done.stdout.decode() == text + "\n" and b"\x1b" not in done.stdout
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb", 0) as gone:
            done = run(stdout=gone)
        assert done.stderr.count(b"\n") <= 1 and b"Traceback" not in done.stderr, done.stderr
    return f"{len(text)} characters, none of them an escape"
