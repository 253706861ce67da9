"""Record the terminal of sample.py as an animated SVG, for the README.

    python record.py --out_dir=out/nano --svg=assets/crystallise.svg

Each frame is one forward pass: masks dim, new tokens bright, settled text plain. No package is
needed, and any browser (GitHub's pages too) plays it.
"""

import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

from configurator import SettingsError, fail, override
from dataset import DataError

import sample

SETTINGS = {
    **{k: v for k, v in sample.DEFAULTS.items() if k not in ("num_samples", "delay")},
    "svg": "assets/crystallise.svg",
    "max_new_tokens": 320,
    "columns": 64,
    "frame_ms": 120,
    "hold_ms": 4000,  # how long the finished text stands
}
WIDTH, HEIGHT = 8.43, 18  # of a character cell, for a 14 px monospaced font
CLASSES = {sample.PLAIN: "", sample.DIM: "m", sample.BRIGHT: "n"}


def runs(line):
    """A line's (style, character) cells as <tspan>s, one for each run of a style."""
    out, now = [], None
    for style, char in line:
        if style != now:
            out.append([CLASSES[style], ""])
            now = style
        out[-1][1] += char
    return "".join(
        f'<tspan class="{name}">{escape(text)}</tspan>' if name else escape(text)
        for name, text in out
    )


def frames(s):
    """Every pass's picture, a list of lines of (style, character) cells."""
    model, tokenizer = sample.load(s)
    display = sample.Display(tokenizer, model.config.mask_id)
    display.glyph = "\u2591"
    prompt = tokenizer.encode(sample.read_prompt(s.prompt))
    stream = sample.generate_stream(
        model, [prompt], s.max_new_tokens, **sample.options(s, tokenizer)
    )
    for step in stream:
        yield sample.wrap(display.pieces(step, 0), s.columns)


def svg(pictures, s):
    """The animation: one group a frame, shown for its share of the loop."""
    total = len(pictures) * s.frame_ms + s.hold_ms
    rows = max(map(len, pictures))
    w, h = s.columns * WIDTH + 24, rows * HEIGHT + 24
    share = 100 * s.frame_ms / total
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}">',
        "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
        "fill:#c9d1d9;white-space:pre}.m{fill:#484f58}.n{fill:#7ee787;font-weight:bold}"
        f"g{{visibility:hidden;animation:f {total}ms step-end infinite}}"
        f"@keyframes f{{0%{{visibility:visible}}{share:.4f}%{{visibility:hidden}}}}"
        f"g:last-of-type{{animation-name:l}}@keyframes l{{0%{{visibility:visible}}"
        f"{share + 100 * s.hold_ms / total:.4f}%{{visibility:hidden}}}}</style>",
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
    ]
    for i, lines in enumerate(pictures):
        out.append(f'<g style="animation-delay:{i * s.frame_ms}ms">')
        for row, line in enumerate(lines):
            if line:
                y = 12 + HEIGHT * (row + 0.8)
                out.append(f'<text x="12" y="{y:.1f}" xml:space="preserve">{runs(line)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>\n"])


def main(argv):
    try:
        s = SimpleNamespace(**override(SETTINGS, argv))
        if min(s.columns, s.frame_ms, s.hold_ms) < 1:
            raise SettingsError("columns, frame_ms and hold_ms must be at least 1")
        path = Path(s.svg)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg(list(frames(s)), s), encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1024:.0f} kB")
    except (SettingsError, DataError, ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
