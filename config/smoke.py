"""Seconds, not minutes: does everything run here?

    python train.py config/smoke.py        about 10 s on 2 CPU cores; the text is noise
"""

out_dir = "out/smoke"
n_layer = 2
n_head = 2
n_embd = 64
seq_len = 64
batch_size = 8
max_steps = 30
max_minutes = 0
log_every = 10
eval_every = 15
eval_windows = 8
final_windows = 32
sample_tokens = 100
