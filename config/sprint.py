"""As much block-diffusion quality as nanoGPT's CPU run takes time: tiny Shakespeare, by the clock.

    python data/shakespeare_char/prepare.py
    python train.py config/nanogpt_cpu.py                                the clock, and the GPT
    python train.py config/sprint.py --max_minutes=T                     S = 16, in that time
    python train.py config/sprint.py --max_minutes=T --block_size=4 --out_dir=out/sprint4

T are the minutes that the first run has printed at its end, on the same machine just before.
"""

out_dir = "out/sprint"
dataset = "shakespeare_char"
block_size = 16  # S
seq_len = 128
batch_size = 8  # 8 x 128 = 1,024 characters
eval_every = 1_000_000  # no validation in between: the clock runs
sample_tokens = 0
