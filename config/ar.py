"""The nano as a GPT: the baseline of every comparison.

    python train.py config/ar.py --max_minutes=0 --max_steps=1634      as many steps as a nano took

On a CPU, 0.9M parameters: 1.515 +- 0.010 nats a character after these steps, in 2.1 minutes (two
shared cores of an Intel Xeon, bfloat16, torch 2.13.0, seed 1337, one run), where the nano's GPT
level has 1.538 and the 5-gram 1.605.
"""

# the nano's sizes
from config.nano import *  # noqa: F403

out_dir = "out/ar"
draft_weight = 0
block_size = 1  # it has no blocks
local_window = 0
soft = 0
