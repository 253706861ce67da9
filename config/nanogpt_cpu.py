r"""The clock of a comparison: our AR baseline under nanoGPT's settings for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/nanogpt_cpu.py                       says at its end how many minutes, T
    python train.py --dataset=shakespeare_char --block_size=16 --copies=1 --gpt_weight=1 \
        --joint_weight=4 --full_share=0.75 --max_minutes=T --out_dir=out/sprint

nanoGPT's README trains 4 layers, 4 heads, width 128, context 64, batch 12 for 2,000 steps without
dropout and gives 1.88 nats a character after about 3 minutes. The same here: float32, AdamW for
everything at 1e-3 falling to 1e-4, beta2 0.99, 100 steps of warm-up, weight decay 0.1, gradients
clipped at 1, tiny Shakespeare. Different: the fall is linear, there a cosine; the network is
Llama-shaped (rotary positions, RMSNorm, SwiGLU); the loss is taken on fixed windows spread over the
validation text, there on random ones. The last command is the three levels in as much time;
results/notes.md has both beside nanoGPT itself.
"""

out_dir = "out/nanogpt_cpu"
dataset = "shakespeare_char"
objective = "ar"
block_size = 1
n_layer = 4
n_head = 4
n_embd = 128
n_hidden = 344  # 3 x 128 x 344 weights for nanoGPT's 2 x 128 x 512: 0.81M in all, there 0.80M
noise = "balanced"
copies = 1
seq_len = 64
dtype = "float32"
batch_size = 12  # 12 x 64 = 768 characters
max_steps = 2000  # x 768 = 1.54M characters
max_minutes = 0
optimizer = "adamw"
learning_rate = 1e-3
final_lr = 0.1  # of the peak: 1e-4
beta2 = 0.99
warmup_steps = 100
weight_decay = 0.1
eval_every = 250
log_every = 50
