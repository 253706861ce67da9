"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=20 --out_dir=out/nano20

On a CPU 1.8M parameters, 4.5 minutes. Nats a character (+- 0.010), one run each, seed 1337, torch
2.13.0; the 5-gram has 1.605. Tokens a round are estimates, in brackets those of the 5-gram.

    two shared cores of an        steps x 1,024   GPT level   draft   tokens a round
    AMD EPYC, float32                       906       1.595   1.586   6.79 (4.30)
    Intel Xeon, bfloat16                  1,634       1.538   1.538   6.82 (4.61)
    Intel Xeon, in quieter hours          2,529       1.490   1.507   6.91 (4.74)

On a GPU 14M parameters, 5,000 steps of 16,384 characters: not measured yet.
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
