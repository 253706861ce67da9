"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=15 --overwrite=true      longer, on a CPU

On a CPU the settings are the defaults of train.py: 0.8M parameters, S = 8, limited to 4.5 minutes.
Measured on two shared cores of an AMD EPYC (Zen 3, float32, no bf16 units), torch 2.13.0, seed
1337, in nats per character of validation text:

    4.5 minutes, 1.48M tokens: bound <= 2.040 +- 0.011 in a quiet hour (<= 2.113 at 1.05M, <= 2.266
    at 0.61M tokens in slower ones)
    15 minutes, 2.19M tokens: bound <= 1.970 +- 0.011

Only Muon's rate was chosen by measurement (README, notes); width, depth, batch and context are
first guesses that were not compared. On a machine with a GPU: 12.4M parameters, not measured yet;
there `python train.py --device=cpu` gives the small model.
"""

import torch

out_dir = "out/nano"
block_size = 8  # S

if torch.cuda.is_available():  # 12.4M parameters; on a CPU the defaults of train.py, 0.8M
    n_layer = 7
    n_head = 6
    n_embd = 384  # 7 layers of 4 x 384 x 384 + 3 x 384 x 1024 = 1.77M
    seq_len = 256
    batch_size = 64  # 64 x 256 = 16,384 tokens
    max_steps = 5000  # x 16,384 = 82M tokens, 18 passes over the text
    max_minutes = 0
    learning_rate = 1e-3
    muon_lr = 4e-3
    warmup_steps = 100
    eval_every = 250
    log_every = 50
