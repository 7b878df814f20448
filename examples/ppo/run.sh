#!/usr/bin/env bash
# Prompts -> data -> PPO -> Hugging Face model. Every variable below can be set from outside; further arguments go to the training
# command. GRPO with a function: CONFIG=examples/ppo/grpo.yaml OUTPUT=runs/examples/grpo REWARD=examples/rewards/exact_match.py:exact_match
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-2}
CONFIG=${CONFIG:-examples/ppo/toy.yaml}
INPUT=${INPUT:-runs/quickstart/data/prompts_train.jsonl}  # raw records
TOKENIZER=${TOKENIZER:-runs/quickstart/base}
SEQ_LENGTH=${SEQ_LENGTH:-64}
DATA=${DATA:-runs/examples/data/prompts}  # prefix of the packed data
MODEL=${MODEL:-runs/quickstart/sft}
OUTPUT=${OUTPUT:-runs/examples/ppo}
REWARD=${REWARD:-model:runs/quickstart/rm}
EXPORT=${EXPORT:-$OUTPUT/hf}

if [ ! -e "$DATA.json" ]; then
  "$PYTHON" tools/preprocess_data.py --task prompts --input "$INPUT" --tokenizer "$TOKENIZER" --output-prefix "$DATA" --seq-length "$SEQ_LENGTH"
fi

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m mrlhf ppo --config "$CONFIG" \
  --model.path "$MODEL" --data.train "$DATA" --train.output_dir "$OUTPUT" --reward.sources "$REWARD" "$@"

if [ ! -e "$EXPORT/config.json" ]; then
  "$PYTHON" tools/convert/megatron_to_hf.py --checkpoint "$OUTPUT" --output "$EXPORT" --verify
fi
