"""CASCADE-nano on web text: 15M parameters, 512 tokens of context, 200M tokens of FineWeb-Edu.

    python data/fineweb_edu/prepare.py --tokens=200M     400 MB on disk; readme.md there
    python train.py config/fineweb_nano.py

Not measured on a GPU yet.
"""

out_dir = "out/fineweb_nano"
dataset = "fineweb_edu"
n_layer = 6
n_head = 6
n_embd = 192  # 50,258 x 192 = 9.6M tied + 6 x 0.44M + local head 2.8M = 15.1M
tie_embeddings = True
seq_len = 512
block_size = 16
batch_size = 64  # 64 x 512 = 32,768 tokens
max_steps = 6104  # x 32,768 = 200M tokens
max_minutes = 0
warmup_steps = 200
log_every = 50
eval_every = 500
