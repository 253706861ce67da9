"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=15 --overwrite=true      longer, on a CPU

On a CPU the settings are the defaults of train.py: 0.98M parameters, S = 8, limited to 4.5 minutes.
Measured on two shared cores of an AMD EPYC (Zen 3, float32, no bf16 units), torch 2.13.0, seed
1337, in nats per character of validation text:

    4.5 minutes, 0.63M tokens: bound <= 1.936 +- 0.010

The README says what was compared to choose them, at this budget. On a machine with a GPU: 12.7M
parameters, not measured yet; there `python train.py --device=cpu` gives the small model.
"""

import torch

out_dir = "out/nano"
block_size = 8  # S

if torch.cuda.is_available():  # 12.7M parameters; on a CPU the defaults of train.py, 0.98M
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
