"""enwik8 by bytes on the standard 90M / 5M / 5M split: bits per byte on a public yardstick.

    python data/enwik8/prepare.py --from_pip             100 MB on disk; readme.md there
    python train.py config/enwik8.py                     one GPU; not measured on one yet
    python train.py config/enwik8.py --n_layer=4 --n_head=4 --n_embd=192 --seq_len=128 \
        --batch_size=16 --max_minutes=30                 a laptop's share of it
"""

out_dir = "out/enwik8"
dataset = "enwik8"
n_layer = 12
n_head = 8
n_embd = 512  # 12 x 3.2M + local head 2.2M = 41M parameters
seq_len = 512
block_size = 16
batch_size = 64  # 64 x 512 = 32,768 bytes
max_steps = 50_000  # x 32,768 = 1.6B bytes, 18 passes over the training split
max_minutes = 0
learning_rate = 1e-3
muon_lr = 4e-3
warmup_steps = 500
log_every = 50
eval_every = 1000
eval_windows = 256
final_windows = 4096
