"""One row of the README's table of block sizes: same network, tokens and text, another S.

    python train.py config/table.py --block_size=8 --out_dir=out/table/s8
    python train.py config/table.py --objective=ar --block_size=1 --out_dir=out/table/ar

The README, Evaluation, has the loop over all rows. A fixed number of steps makes the tokens equal;
without a validation in between, the tokens/s in the table are those of training alone.
"""

dataset = "shakespeare"
neighbours = 0  # the plain recipe: the defaults of train.py add three things
noise = "balanced"
copies = 1
learning_rate = 3e-3
n_layer = 4
n_head = 4
n_embd = 128
seq_len = 128  # a multiple of every S in the table; S = 128 is plain masked diffusion
batch_size = 8  # 8 x 128 = 1,024 tokens
max_steps = 640  # x 1,024 = 0.66M tokens
max_minutes = 0
eval_every = 1_000_000
sample_tokens = 0
