"""The nano as a GPT: the baseline of every comparison.

    python train.py config/ar.py
    python train.py config/ar.py --max_minutes=0 --max_steps=2000     as many tokens as another run

On a CPU, 0.9M parameters and the nano's 906 steps = 0.93M characters (two shared cores of an AMD
EPYC without bf16 units, one thread, torch 2.13.0, seed 1337, one run): 1.580 +- 0.010 nats a
character of 512 windows, where the nano's GPT level has 1.595 and the 5-gram 1.605.
"""

from config.nano import *  # noqa: F403  the nano's sizes

out_dir = "out/ar"
draft_weight = 0
block_size = 1  # it has no blocks
local_window = 0
soft = 0
