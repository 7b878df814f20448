#!/usr/bin/env bash
# Corpus -> tokenizer -> data -> SFT -> GRPO with a calculator, and the share of right answers to held-out prompts before and after.
# Every variable can be set from outside; further arguments go to the training command of GRPO.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-2}
OUT=${OUT:-runs/calculator}
ROWS=${ROWS:-6000}
SEED=${SEED:-1}
LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m mrlhf)

if [ ! -e "$OUT/data/prompts_train.json" ]; then
  "$PYTHON" examples/calculator/corpus.py --output-dir "$OUT/data" --seed "$SEED" --rows "$ROWS"
  "$PYTHON" examples/quickstart/tokenizer.py --data-dir "$OUT/data" --output-dir "$OUT/base"
  "$PYTHON" tools/preprocess_data.py --task sft --loss-on all --input "$OUT/data/sft_train.jsonl" --tokenizer "$OUT/base" \
    --output-prefix "$OUT/data/sft_train" --seq-length 256
  for split in eval train; do
    "$PYTHON" tools/preprocess_data.py --task prompts --input "$OUT/data/prompts_$split.jsonl" --tokenizer "$OUT/base" \
      --output-prefix "$OUT/data/prompts_$split" --seq-length 64
  done
fi

evaluate() {  # of a run: one sampled conversation on each held-out prompt
  "$PYTHON" -m mrlhf generate --checkpoint "$OUT/$1" --prompts "$OUT/data/prompts_eval.jsonl" --output "$OUT/$1.jsonl" --dtype float32 \
    --environment examples/calculator/calculator.py:Calculator --max_turns 3 --max_new_tokens 40 --kv_cache_mib 64
}

"${LAUNCH[@]}" sft --config examples/calculator/sft.yaml --model.path "$OUT/base" --data.train "$OUT/data/sft_train" \
  --train.output_dir "$OUT/sft" --train.seed "$SEED" ${SFT_OPTIONS:-}
evaluate sft
"${LAUNCH[@]}" ppo --config examples/calculator/ppo.yaml --model.path "$OUT/sft" --data.train "$OUT/data/prompts_train" \
  --data.eval "$OUT/data/prompts_eval" --train.output_dir "$OUT/ppo" --train.seed "$SEED" "$@"
evaluate ppo
