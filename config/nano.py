"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=20 --out_dir=out/nano20

On a CPU, 1.8M parameters in 4.5 minutes: 906 steps = 0.93M characters on two shared cores of an AMD
EPYC without bf16 units, torch 2.13.0, seed 1337, one run. Nats a character of 512 windows,
+- 0.010, and the estimated tokens a round; in brackets the 5-gram's:

    GPT level 1.595 (1.605), one pass for a block of 16 characters 1.586, 6.79 tokens (4.30)

On two cores of an Intel Xeon with bf16 units 2,501 steps, and in another run 2,529: 1.485 and 1.490
(1.605), 1.496 and 1.507, 6.9 tokens (4.74). `python sample.py --num_samples=64 --max_new_tokens=128
--temperature=1` measures 6.54 and 6.77 +- 0.14 tokens a round.

On a GPU, 14M parameters and 5,000 steps of 16,384 characters: not measured yet.
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
