"""Block diffusion as in BD3-LM (arXiv 2503.09573): several denoising passes a block, the tokens of
a pass drawn independently, text read block by block.

    python train.py config/bd3lm.py
    python train.py config/bd3lm.py --noise=clipped --clip_low=0.1 --clip_high=0.9 \
        --out_dir=out/clipped            BD3-LM's kind of noise: its loss is not the bound
    python train.py config/bd3lm.py --corruption=target --noise=uniform --weighting=cascade \
        --out_dir=out/note               one target block a sequence: CASCADE's Phase 1 note

On a CPU, 0.9M parameters in 4.5 minutes: 1,428 steps = 2.92M characters on two shared cores of an
Intel Xeon, bfloat16, torch 2.13.0, seed 1337, one run: bound <= 1.930 +- 0.012 nats a character
(the 5-gram: 1.605). On a GPU: not measured yet.
"""

import torch

# the nano's sizes
from config.nano import *  # noqa: F403

out_dir = "out/bd3lm"
context = "block"
block_size = 8
local_window = 0
soft = 0
noise = "balanced"
if not torch.cuda.is_available():
    batch_size = 16  # its loss is noisier than a GPT's
