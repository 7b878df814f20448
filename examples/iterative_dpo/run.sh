#!/usr/bin/env bash
# Rounds of: the policy answers every prompt several times -> best against worst -> DPO from the policy, which is then the next policy.
# Every variable can be set from outside; further arguments go to the training command of every round.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-2}
ROUNDS=${ROUNDS:-3}
BEST_OF=${BEST_OF:-8}
PROMPTS=${PROMPTS:-2000}                 # prompts a round: lines of INPUT, other ones in every round
INPUT=${INPUT:-runs/quickstart/data/prompts_train.jsonl}
TOKENIZER=${TOKENIZER:-runs/quickstart/base}
SEQ_LENGTH=${SEQ_LENGTH:-256}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-12}
DTYPE=${DTYPE:-float32}
CONFIG=${CONFIG:-examples/dpo/toy.yaml}
MODEL=${MODEL:-runs/quickstart/sft}
REWARD=${REWARD:-model:runs/quickstart/rm}
OUTPUT=${OUTPUT:-runs/examples/iterative_dpo}

policy=$MODEL
for round in $(seq 1 "$ROUNDS"); do
  here=$OUTPUT/round_$round
  mkdir -p "$here"
  if [ ! -e "$here/pairs.jsonl" ]; then
    awk -v from=$(((round - 1) * PROMPTS)) -v to=$((round * PROMPTS)) 'NR > from && NR <= to' "$INPUT" > "$here/prompts.jsonl"
    "$PYTHON" -m mrlhf generate --checkpoint "$policy" --prompts "$here/prompts.jsonl" --output "$here/best.jsonl" --pairs "$here/pairs.jsonl" \
      --best_of "$BEST_OF" --reward.sources "$REWARD" --max_new_tokens "$MAX_NEW_TOKENS" --dtype "$DTYPE" --seed "$round" --kv_cache_mib 64
  fi
  if [ ! -e "$here/pairs.json" ]; then
    "$PYTHON" tools/preprocess_data.py --task preference --input "$here/pairs.jsonl" --tokenizer "$TOKENIZER" --output-prefix "$here/pairs" \
      --seq-length "$SEQ_LENGTH"
  fi
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m mrlhf dpo --config "$CONFIG" --model.path "$policy" \
    --data.train "$here/pairs" --data.eval null --train.output_dir "$here/dpo" --train.seed "$round" "$@"
  policy=$here/dpo
done
echo "the last policy: $policy"
