#!/usr/bin/env bash
# Texts -> packed data -> pretraining -> Hugging Face model.
# Every variable below can be set from outside; further arguments go to the training command.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python}
NPROC=${NPROC:-2}
CONFIG=${CONFIG:-examples/pretrain/toy.yaml}
INPUT=${INPUT:-runs/quickstart/data/pretrain.jsonl}  # raw records
TOKENIZER=${TOKENIZER:-runs/quickstart/base}
SEQ_LENGTH=${SEQ_LENGTH:-256}
DATA=${DATA:-runs/examples/data/pretrain}  # prefix of the packed data
MODEL=${MODEL:-runs/quickstart/base}
OUTPUT=${OUTPUT:-runs/examples/pretrain}
EXPORT=${EXPORT:-$OUTPUT/hf}

if [ ! -e "$DATA.json" ]; then
  "$PYTHON" tools/preprocess_data.py --task pretrain --input "$INPUT" --tokenizer "$TOKENIZER" --output-prefix "$DATA" --seq-length "$SEQ_LENGTH"
fi

"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m mrlhf pretrain --config "$CONFIG" \
  --model.path "$MODEL" --data.train "$DATA" --train.output_dir "$OUTPUT" "$@"

if [ ! -e "$EXPORT/config.json" ]; then
  "$PYTHON" tools/convert/megatron_to_hf.py --checkpoint "$OUTPUT" --output "$EXPORT" --verify
fi
