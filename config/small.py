"""14M parameters on the complete Shakespeare: large enough that its speed means something.

    python train.py config/small.py
"""

# train.py's defaults are its shape: 6 layers of 384, blocks of 16 in 256 characters
out_dir = "out/small"
batch_size = 16  # x 256 = 4,096 characters
max_steps = 1650
learning_rate = 5e-3
muon_lr = 5e-3
warmup_steps = 40
