"""Block diffusion as in BD3-LM (arXiv 2503.09573): several denoising passes a block, the tokens of
a pass drawn independently, text read block by block.

    python train.py config/bd3lm.py
    python train.py config/bd3lm.py --noise=clipped --clip_low=0.1 --clip_high=0.9 \
        --out_dir=out/clipped            BD3-LM's kind of noise: its loss is not the bound
    python train.py config/bd3lm.py --corruption=target --noise=uniform --weighting=cascade \
        --out_dir=out/note               one target block a sequence: CASCADE's Phase 1 note
"""

from config.nano import *  # noqa: F403  the nano's sizes

out_dir = "out/bd3lm"
context = "block"
block_size = 8
local_window = 0
soft = 0
noise = "balanced"
if not torch.cuda.is_available():  # noqa: F405
    batch_size = 16  # its loss is noisier than a GPT's
