"""Record what sample.py shows on a terminal as an animated SVG, for the README.

    python tools/animate.py --out_dir=out/nano --svg=assets/crystallise.svg

A frame is a pass of the network, in sample.py's colours. Any browser plays it, GitHub's pages too;
for readers who have asked for less motion it stands still on the finished text.
"""

import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
from util import checkpoint, view
from util.data import make_tokenizer, opening, writing
from util.settings import check, guarded, require, settings

DEFAULTS = {
    "out_dir": "out/nano", "svg": "crystallise.svg", "prompt": "", "max_new_tokens": 240,
    "mode": "auto", "temperature": 0.8, "seed": 1337, "columns": 64, "frame_ms": 250,
    "hold_ms": 4000,  # how long the finished text stands
}
WIDTH, HEIGHT = 8.8, 18  # of a character, at most, in a monospaced font of 14 pixels
CLASSES = {view.DIM: "d", view.GREEN: "a", view.YELLOW: "o"}  # dim, accepted, own
STYLE = """
text {{ font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #d0d7de; white-space: pre }}
.d {{ fill: #7d8590 }} .a {{ fill: #56d364 }} .o {{ fill: #e3b341 }}
g {{ visibility: hidden }}
g:last-of-type {{ visibility: visible }}
@media (prefers-reduced-motion: no-preference) {{
  g {{ animation: frame {total}ms step-end infinite }}
  g:last-of-type {{ animation-name: last }}
}}
@keyframes frame {{ 0% {{ visibility: visible }} {share:.3f}% {{ visibility: hidden }} }}
@keyframes last {{ 0% {{ visibility: visible }} {hold:.3f}% {{ visibility: hidden }} }}
"""


def frames(s):
    """The lines of each frame, with a terminal's codes; at the end those of the settled text."""
    model, state = checkpoint.load_model(s.out_dir)
    tokenizer = make_tokenizer(state["meta"])
    decode, mask_id = tokenizer.decode, model.config.mask_id
    prompt = tokenizer.encode(s.prompt).tolist() or opening(tokenizer)
    mode = "gpt" if state["settings"]["draft_weight"] == 0 else s.mode
    for step in sample.generate_stream(model, [prompt], s.max_new_tokens, mode=mode,
                                       temperature=s.temperature, seed=s.seed):
        figures = view.wrap([*view.LEGEND, (view.DIM, f"| {step}")], s.columns)
        yield view.wrap(view.pieces(step, 0, decode, mask_id, 10**6), s.columns), figures
    yield view.wrap([("", decode(step.rows[0]))], s.columns), figures


def tspans(line):
    """A line with a terminal's codes as text of an SVG."""
    out, kind = "", None
    for code, text in re.findall(r"(\x1b\[\d*m)|([^\x1b]+)", line):
        if code:
            kind = CLASSES.get(code)
        else:
            out += f'<tspan class="{kind}">{escape(text)}</tspan>' if kind else escape(text)
    return out


def draw(pictures, s):
    """The SVG: a group for each frame, visible for its share of the loop."""
    total, rows = (len(pictures) - 1) * s.frame_ms + s.hold_ms, max(len(x) for x, _ in pictures)
    style = STYLE.format(total=total, share=100 * s.frame_ms / total, hold=100 * s.hold_ms / total)
    w, h = s.columns * WIDTH + 32, (rows + 4) * HEIGHT
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" width="{w:.0f}" '
           f'height="{h:.0f}"><style>{style}</style>'
           f'<rect width="{w:.0f}" height="{h:.0f}" rx="8" fill="#0d1117"/>']
    for i, (lines, figures) in enumerate(pictures):
        # a negative delay: when the page opens, the loop has begun already
        out.append(f'<g style="animation-delay:{i * s.frame_ms - total}ms">')
        for row, line in [*enumerate(lines), *enumerate(figures, rows + 1)]:
            y = HEIGHT * (row + 1.3)
            out.append(f'<text x="16" y="{y:.0f}">{tspans(line)}</text>')
        out.append("</g>")
    return "\n".join([*out, "</svg>\n"])


@guarded
def main(argv):
    s, _ = settings(DEFAULTS, argv)
    check(s, least={"columns": 20, "frame_ms": 1, "hold_ms": 1})
    require(s.svg.endswith(".svg"), f"--svg={s.svg} must end in .svg")
    with writing(s.svg):
        Path(s.svg).write_text(draw(list(frames(s)), s), encoding="utf-8")
    print(f"{s.svg}: {Path(s.svg).stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
