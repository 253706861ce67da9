"""Seconds, not minutes: does everything run here?

    python train.py config/smoke.py        about 10 s on two CPU cores; the model knows nothing
"""

out_dir = "out/smoke"
seq_len = 64
block_size = 8
n_layer = 2
n_head = 2
n_embd = 64
batch_size = 8
max_steps = 30
learning_rate = 1e-2
warmup_steps = 5
log_every = 10
eval_every = 15
eval_windows = 8
final_windows = 32
