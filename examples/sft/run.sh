#!/usr/bin/env bash
# Chats -> packed data -> fine-tuning -> Hugging Face model.
# Every variable below can be set from outside; further arguments go to the training command.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-2}
CONFIG=${CONFIG:-examples/sft/toy.yaml}
INPUT=${INPUT:-runs/quickstart/data/sft_train.jsonl}  # raw records
TOKENIZER=${TOKENIZER:-runs/quickstart/base}
SEQ_LENGTH=${SEQ_LENGTH:-256}
DATA=${DATA:-runs/examples/data/sft}  # prefix of the packed data
MODEL=${MODEL:-runs/quickstart/pretrain}
OUTPUT=${OUTPUT:-runs/examples/sft}
HF=${HF:-}  # a Hugging Face model to start from: converted and checked first
EXPORT=${EXPORT:-$OUTPUT/hf}

if [ ! -e "$DATA.json" ]; then
  "$PYTHON" tools/preprocess_data.py --task sft --input "$INPUT" --tokenizer "$TOKENIZER" --output-prefix "$DATA" --seq-length "$SEQ_LENGTH"
fi

if [ -n "$HF" ]; then
  MODEL=$OUTPUT.start
  [ -d "$MODEL" ] || "$PYTHON" tools/convert/hf_to_megatron.py --hf "$HF" --output "$MODEL" --verify
fi

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m mrlhf sft --config "$CONFIG" \
  --model.path "$MODEL" --data.train "$DATA" --train.output_dir "$OUTPUT" "$@"

if [ ! -e "$EXPORT/config.json" ]; then
  "$PYTHON" tools/convert/megatron_to_hf.py --checkpoint "$OUTPUT" --output "$EXPORT" --verify
fi
