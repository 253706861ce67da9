"""Block diffusion alone, as in BD3-LM (arXiv 2503.09573): blocks read the text before them
block-causally, no GPT level, no local head.

    python train.py config/bd3lm.py
    python train.py config/bd3lm.py --noise=clipped --copies=1 --block_size=16 --out_dir=out/bd16
    python train.py config/bd3lm.py --corruption=target --noise=uniform --weighting=cascade \
        --out_dir=out/note                               one target block per sequence

The second is nearest to the paper's own training noise; the third is CASCADE's Phase 1 note as it
is written. results/README.md has this model beside the three levels.
"""

out_dir = "out/bd3lm"
context = "block"
local_window = 0
