"""14M parameters on the complete Shakespeare: large enough that its speed means something.

    python train.py config/small.py

1,650 steps of 4,096 characters in 74 minutes on two shared cores of an Intel Xeon, bfloat16, torch
2.13.0, seed 1337, one run (other work paused it for about 5 of them): GPT level 1.356 +- 0.009 nats
a character, draft NLL 1.424, an estimated 6.29 tokens a round; the nano's 5-gram has 1.605. At
batch 1 `verify` is 2.28 (2.06-2.73) times as fast as `gpt` in bfloat16, 1.56 (1.08-1.60) times in
float32, in which `gpt` is faster (`bench.py decode`). On a GPU: not measured yet.
"""

# train.py's defaults are its shape: 6 layers of 384, blocks of 16 in 256 characters
out_dir = "out/small"
batch_size = 16  # x 256 = 4,096 characters
max_steps = 1650
learning_rate = 5e-3
muon_lr = 5e-3
warmup_steps = 40
