"""Record the terminal of sample.py as an animated SVG, for the README.

    python tools/animate.py --out_dir=out/nano --svg=assets/crystallise.svg

A frame is a forward pass: masks and drafts dim, accepted drafts green, the GPT level's own tokens
yellow, settled text plain, passes and tokens a pass below. No package is needed, and any browser
(GitHub's pages too) plays it; where motion is unwelcome it stands on the finished text.
"""

import math
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from any folder

import sample
from util.configurator import check_settings, guarded, override
from util.display import BRIGHT, DIM, OWN, PLAIN, Display, wrap
from util.machine import autocast, choose_dtype

SETTINGS = {
    **{k: v for k, v in sample.DEFAULTS.items() if k not in ("num_samples", "delay")},
    "svg": "assets/crystallise.svg",
    "max_new_tokens": 320,
    "columns": 64,
    "frame_ms": 160,
    "hold_ms": 5000,  # how long the finished text stands
}
WIDTH, HEIGHT = 8.43, 18  # of a character cell, for a 14 px monospaced font
CLASSES = {PLAIN: "", DIM: "d", BRIGHT: "a", OWN: "o"}
STYLE = (
    "text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#d0d7de;"
    "white-space:pre}}.d{{fill:#7d8590}}.a{{fill:#56d364;font-weight:bold}}"
    ".o{{fill:#e3b341;font-weight:bold}}g{{visibility:hidden}}g:last-of-type{{visibility:visible}}"
    # each frame's delay is negative: its cycle began before the page did
    "@media(prefers-reduced-motion:no-preference){{g{{animation:f {total}ms step-end infinite}}"
    "g:last-of-type{{animation-name:l}}}}"
    "@keyframes f{{0%{{visibility:visible}}{share:.4f}%{{visibility:hidden}}}}"
    "@keyframes l{{0%{{visibility:visible}}{hold:.4f}%{{visibility:hidden}}}}"
)


def runs(line):
    """A line's (style, character) cells as <tspan>s, one for each run of a style."""
    out, now = [], None
    for style, char in line:
        if style != now:
            out.append([CLASSES[style], ""])
            now = style
        out[-1][1] += char
    return "".join(f'<tspan class="{name}">{escape(text)}</tspan>' if name else escape(text)
                   for name, text in out)


def frames(s):
    """(lines of the text, line of the caption) after every pass, and once more when all has
    settled; a line is a list of (style, character) cells."""
    model, tokenizer = sample.load(s)
    display = Display(tokenizer, model.config.mask_id)
    display.glyph = "\u2591"
    prompt = tokenizer.encode(sample.read_prompt(s.prompt))
    s.device = str(next(model.parameters()).device)
    choose_dtype(s, s.device, small=True)
    with autocast(s):
        how = sample.options(s, tokenizer)
        for step in sample.generate_stream(model, [prompt], s.max_new_tokens, **how):
            caption = wrap(display.caption(step), s.columns)[0]
            yield wrap(display.pieces(step, 0), s.columns), caption
    yield wrap([(PLAIN, tokenizer.decode(step.rows()[0]))], s.columns), caption


def svg(pictures, s):
    """The animation: one group a frame, shown for its share of the loop."""
    total = (len(pictures) - 1) * s.frame_ms + s.hold_ms
    below = max(len(lines) for lines, _ in pictures) + 1  # the caption's line, under the longest
    w, h = s.columns * WIDTH + 32, (below + 1) * HEIGHT + 28
    style = STYLE.format(total=total, share=100 * s.frame_ms / total, hold=100 * s.hold_ms / total)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}">',
        f"<style>{style}</style>",
        f'<rect x="1" y="1" width="{w - 2:.0f}" height="{h - 2:.0f}" rx="8" fill="#0d1117" '
        'stroke="#484f58"/>',
    ]
    for i, (lines, caption) in enumerate(pictures):
        out.append(f'<g style="animation-delay:{i * s.frame_ms - total}ms">')
        for row, line in [*enumerate(lines), (below, caption)]:
            if line:
                y = 14 + HEIGHT * (row + 0.8)
                out.append(f'<text x="16" y="{y:.1f}" xml:space="preserve">{runs(line)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>\n"])


@guarded
def main(argv):
    s = SimpleNamespace(**override(SETTINGS, argv))
    check_settings(s, {}, dict.fromkeys(("columns", "frame_ms", "hold_ms"), (1, math.inf)))
    path, picture = Path(s.svg), svg(list(frames(s)), s)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(picture, encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
