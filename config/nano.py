"""CASCADE-nano on the complete Shakespeare, which ships here: something to read within minutes.

    python train.py config/nano.py
    python train.py config/nano.py --max_minutes=20 --out_dir=out/nano20         longer, on a CPU

Its settings are the defaults of train.py. On a CPU: 1.3M parameters, S = 8, limited to 4.5 minutes.
Measured on two shared cores of an AMD EPYC (bf16 units), torch 2.13.0, seed 1337, one run, in nats
per character of 512 validation windows:

    4.5 minutes, 1.36M characters: GPT level 1.6003, one joint pass a block 1.7149, bound <= 1.9647

On a machine with a GPU: 14M parameters and 5,000 steps of 16,384 tokens, not measured yet; there
`python train.py --device=cpu` still takes the GPU's settings, so give a smaller --n_embd too.
"""

out_dir = "out/nano"
