#!/usr/bin/env bash
# From nothing to a trained model and its text, on any machine with Python 3.11+:  bash launch/quickstart.sh
# Needs no GPU, no account, and no network beyond the package index. A second run goes straight to training.
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements.txt
python="$VENV/bin/python"

"$python" -m data.prepare stdlib --vocab_size=2048
"$python" train.py configs/debug.py --overwrite "$@"
for prompt in "def __init__(self" "import"; do
    printf '\n--- a sample, prompt "%s"\n' "$prompt"
    "$python" generate.py out/debug --prompt "$prompt" --max_new_tokens=120 --temperature=0.7 --top_k=50
done
cat <<EOF

Everything of this run is in $(pwd)/out/debug:
  curves.png      loss, learning rate, gradient norm, throughput, attention logits, expert load
  samples.md      text sampled while training
  metrics.jsonl   one JSON record a line
  checkpoints/    latest and best; continue with: $python train.py configs/debug.py --resume --max_steps=...
The data: $(pwd)/data/stdlib. More text: $python generate.py out/debug --prompt "class " --stream
EOF
