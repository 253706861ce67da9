"""The nano as a GPT: the baseline of every comparison.

    python train.py config/ar.py
    python train.py config/ar.py --max_minutes=0 --max_steps=2000     as many tokens as another run
"""

from config.nano import *  # noqa: F403  the nano's sizes

out_dir = "out/ar"
draft_weight = 0
block_size = 1  # it has no blocks
local_window = 0
soft = 0
