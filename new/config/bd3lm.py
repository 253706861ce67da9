"""Block diffusion as in BD3-LM (arXiv 2503.09573): several denoising passes a block, the tokens of
a pass drawn independently, text read block by block.

    python train.py config/bd3lm.py
    python train.py config/bd3lm.py --noise=clipped --out_dir=out/clipped      the paper's own noise
    python train.py config/bd3lm.py --corruption=target --noise=uniform --weighting=cascade \
        --out_dir=out/note                       one target block a sequence: CASCADE's Phase 1 note
"""

from config.nano import *  # noqa: F403  the nano's sizes

out_dir = "out/bd3lm"
context = "block"
block_size = 8
local_window = 0
soft = 0
noise = "balanced"
