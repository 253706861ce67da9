"""nanoGPT's baby GPT on tiny Shakespeare, by characters, as a model of three levels.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char.py           one GPU; not measured on a GPU yet
    python train.py config/shakespeare_char.py --objective=ar --out_dir=out/sc_ar

The shape, batch and steps are those of nanoGPT's config/train_shakespeare_char.py: 6 layers, 6
heads, width 384, context 256, 64 sequences, 5,000 steps; its autoregressive loss is 1.4697 nats a
character (nanoGPT's README, an A100, 3 minutes). There is no dropout here, which nanoGPT has at 0.2
against its 82 passes over the text: look at the best checkpoint (best.pt), not the last.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"  # 65 characters, 1,003,854 of them for training
block_size = 4  # S
n_layer = 6
n_head = 6
n_embd = 384  # 6 layers of 4 x 384 x 384 + 3 x 384 x 1024 = 1.77M; with the local head 12.2M in all
seq_len = 256
batch_size = 64  # 64 x 256 = 16,384 characters
max_steps = 5000  # x 16,384 = 82M characters
max_minutes = 0
learning_rate = 1e-3
muon_lr = 4e-3
warmup_steps = 100
eval_every = 250
log_every = 50
