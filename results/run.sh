#!/usr/bin/env bash
# Every table and figure of results/ and of the README, from the commit that it runs on.
#
#     bash results/run.sh                     about 75 minutes on two cores
#     STEPS=40 WINDOWS=32 bash results/run.sh       the same in small, to see whether it runs
#
# Writes results/README.md, results/frontier.csv and assets/*.svg. Checkpoints go to a folder of this
# commit and this number of steps in out/results/; started again, it keeps the runs that are finished.
# Two models train at a time, one thread each; what is timed runs alone.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -z "$(git status --porcelain -- '*.py' '*.sh')" ] || { echo "commit the code first" >&2; exit 1; }
pip install -q -r requirements.txt matplotlib
steps=${STEPS:-6000} windows=${WINDOWS:-512}
out=out/results/$(git rev-parse --short HEAD)-$steps page=results/README.md began=$SECONDS
mkdir -p $out

train() {  # name settings...: one run on one thread, unless it is finished
    [ -f $out/$1/done ] && return
    OMP_NUM_THREADS=1 python train.py "${@:2}" --max_minutes=0 --max_steps=$steps \
        --eval_every=500 --sample_tokens=0 --out_dir=$out/$1 --overwrite=true > $out/$1.txt
    touch $out/$1/done
}
levels() {  # name rows: every level and these rules
    show python eval.py --out_dir=$out/$1 --windows=$windows --rule_windows=$windows --rows=$2 \
        --csv=$out/all.csv
}
say() { printf '\n%s\n' "$@" >> $page; }
show() {  # a command, then what it prints
    printf '\n    $ %s\n' "$*" >> $page
    "$@" | sed 's/^/    /' >> $page
}

train s8 --acceptance=true & first=$!
train s16 --block_size=16 --acceptance=true
wait $first
train bd3lm config/bd3lm.py & first=$!
train ar --objective=ar
wait $first
if [ ! -f $out/nano/done ]; then
    python train.py config/nano.py --out_dir=$out/nano --overwrite=true > $out/nano.txt
    touch $out/nano/done
fi

cat > $page <<EOF
# Results

Made by \`bash results/run.sh\` on commit $(git rev-parse --short HEAD):
$(lscpu | sed -n 's/Model name: *//p' | head -1), $(nproc) cores shared with others, bf16 units: \
$(grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo yes || echo no), \
torch $(python -c 'import torch; print(torch.__version__)'). Seed 1337, one run each.
The text is the complete Shakespeare by characters. \`+-\` is the standard error of the mean over
validation windows, which all models share: two figures that differ by less may change places on
other text.
EOF
say "## The quick start" "\`python train.py config/nano.py\`, 4.5 minutes on both cores:"
sed 's/^/    /; 1i\\' $out/nano.txt | grep -vE '^    step +[0-9]*50 ' >> $page
say "## Four models, $steps steps of 512 characters each, one thread" \
    "Named by what differs from train.py's defaults. The minutes are those of a crowded machine."
for run in "s8 --acceptance=true" "s16 --block_size=16 --acceptance=true" "bd3lm config/bd3lm.py" "ar --objective=ar"; do
    say "**$run**"
    grep -E "^(model|after|bound|NLL)" $out/${run%% *}.txt | sed 's/^/    /; 1i\\' >> $page
done
say "## Every level, and rules at K passes a block"
rm -f $out/*.csv
rows=$(printf '%s,' {left_to_right,confidence}:{1,2,4,8})
for run in s8 bd3lm; do
    levels $run ${rows%,}
done
levels s16 $rows$(printf '%s,' {left_to_right,confidence}:16 | sed 's/,$//')
show python eval.py --out_dir=$out/ar --windows=$windows --csv=$out/all.csv
say "## What mode verify accepts, and an n-gram in the drafter's place"
for run in s8 s16 nano; do
    show python eval.py --out_dir=$out/$run --drafts=true --csv=$out/drafts.csv
done
say "## What choosing the passes can win" \
    "Fitted on every other window, scored on the rest; the oracles know the losses."
for run in s8 s16 bd3lm; do
    show python eval.py --out_dir=$out/$run --schedules=true --windows=$windows
done
say "## Decoding speed beside the AR baseline" "verify:D is a fixed number of drafts."
blocks=block:1,block:2,block:4
show python bench.py decode --out_dir=$out/s8 --ar_dir=$out/ar \
    --modes=gpt,verify,verify:2,verify:4,verify:7,$blocks
show python bench.py decode --out_dir=$out/s16 --ar_dir=$out/ar \
    --modes=gpt,verify,verify:3,verify:7,verify:15,$blocks
say "## A training step beside the AR baseline's"
show python bench.py train
show python bench.py train --n_layer=6 --n_embd=384 --seq_len=256 --block_size=16 \
    --batch_size=16 --rounds=3
say "## Memory of a training step at batch 1"
show python bench.py memory

python - $out <<'EOF'
import csv, sys
label = {"s8": "cascade, S = 8", "s16": "cascade, S = 16", "bd3lm": "block diffusion, S = 8"}
read = lambda name: list(csv.DictReader(open(f"{sys.argv[1]}/{name}.csv")))
rows, gpt = [], {}
for r in read("all"):
    run, (rule, *K) = r["run"].split("/")[-1], r["method"].split()
    if rule == "gpt":
        gpt[run] = r["nll"], r["nll_error"]
        rows += [("AR baseline", 1, *gpt[run])] if run == "ar" else []
    elif rule.endswith("gram") and run == "ar":
        rows.append((rule, "", r["nll"], r["nll_error"]))
    elif K and (rule == "left_to_right" or run == "bd3lm"):
        name = label[run] + (", most certain first" if rule == "confidence" else "")
        rows.append((name, r["passes_per_token"], r["nll"], r["nll_error"]))
for r in read("drafts"):
    run = r["run"].split("/")[-1]
    if r["drafter"] == "block level" and run in gpt:
        rows.append((f"verify, S = {r['block_size']}", 1 / float(r["tokens_per_pass"]), *gpt[run]))
with open("results/frontier.csv", "w", newline="") as f:
    table = csv.writer(f, lineterminator="\n")
    table.writerows([("method", "passes_per_token", "nll", "nll_error"), *rows])
EOF
python tools/plot.py
show python tools/animate.py --out_dir=$out/nano --prompt=KING. --max_new_tokens=240 --seed=3
say "![quality against passes](../assets/frontier.svg)" \
    "All of this took $(((SECONDS - began) / 60)) minutes, runs finished before left out."
