"""As much block-diffusion quality as nanoGPT's CPU run takes time: tiny Shakespeare, by the clock.

    python data/shakespeare_char/prepare.py
    python train.py config/nanogpt_cpu.py                                the clock, and the GPT
    python train.py config/sprint.py --max_minutes=T                     S = 16, in that time
    python train.py config/sprint.py --max_minutes=T --block_size=4 --out_dir=out/sprint4

T are the minutes that the first run has printed at its end, on the same machine just before.
Measured on two shared cores of an AMD EPYC (Zen 3, float32), torch 2.13.0, seed 1337, T = 4.2: the
first run 1.724 +- 0.013 nats a character; S = 1 bound <= 1.649 +- 0.011, S = 4 <= 1.896 +- 0.011,
S = 16 <= 2.030 +- 0.014. All is train.py's default, chosen at S = 8 on another text (README).
"""

out_dir = "out/sprint"
dataset = "shakespeare_char"
block_size = 16  # S
eval_every = 1_000_000  # no validation in between: the clock runs
sample_tokens = 0
