"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=20 --out_dir=out/nano20
"""

import torch

out_dir = "out/nano"
if not torch.cuda.is_available():  # on a GPU train.py's defaults are used
    seq_len = 128
    n_layer = 2
    n_embd = 192  # 2 layers of 0.44M, local head of 0.89M: 1.8M parameters
    batch_size = 8  # 8 x 128 = 1,024 characters
    max_steps = 0
    max_minutes = 4.5
    learning_rate = 1.2e-2
    muon_lr = 5e-3
    warmup_steps = 40
