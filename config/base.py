"""139M parameters, 1,024 tokens of context, 10B tokens of FineWeb-Edu, for 8 GPUs.

    python data/fineweb_edu/prepare.py --tokens=10B      20 GB on disk; readme.md there
    torchrun --nproc_per_node=8 train.py config/base.py

Not measured on a GPU yet. By its FLOPs a step takes about three times that of the AR baseline:
three streams, two of them noisy copies.
"""

out_dir = "out/base"
dataset = "fineweb_edu"
n_layer = 12
n_head = 12
n_embd = 768  # 50,258 x 768 = 38.6M tied + 12 x 7.1M + local head 15.5M = 139M
tie_embeddings = True
seq_len = 1024
block_size = 16
batch_size = 8 * 64  # 512 sequences x 1,024 = 524,288 tokens
micro_batch = 16  # per GPU: 4 forward passes a step
max_steps = 19073  # x 524,288 = 10B tokens
max_minutes = 0
learning_rate = 1e-3
muon_lr = 3e-3
warmup_steps = 700
log_every = 10
eval_every = 500
eval_windows = 512
