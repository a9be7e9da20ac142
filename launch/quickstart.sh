#!/usr/bin/env bash
# From nothing to a trained model and its text, on any machine with Python 3.11+:  bash launch/quickstart.sh
# Needs no GPU, no account, and no network beyond the package index. A second run goes straight to training.
# Flags go to the training:  bash launch/quickstart.sh --out_dir=out/mine --max_steps=900
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install requirements.txt
python="$VENV/bin/python"

about="$("$python" -m settings configs/debug.py "$@")"  # a mistake in the flags ends it here
out="${about%$'\n'*}"
case " $* " in
    *" --data"*) prompts=("") ;;  # other text does not begin like Python
    *) prompts=("def __init__(self" "import") ;;
esac
"$python" -m data.prepare stdlib --vocab_size=2048
"$python" train.py configs/debug.py --overwrite "$@"
for prompt in "${prompts[@]}"; do
    printf '\n--- a sample, prompt "%s"\n' "$prompt"
    "$python" generate.py "$out" --prompt "$prompt" --max_new_tokens=120 --temperature=0.7 --top_k=50
done
quoted="$(printf %q "$out")" longer=""
if [ -d "$out/checkpoints/step_00000150" ] && [ -d "$out/checkpoints/step_00000450" ]; then
    start="$quoted/checkpoints/step_00000150"  # of 450 steps, the last checkpoint before the learning rate falls
    longer="; train longer: $python train.py --resume=$start --max_steps=900 --out_dir=out/longer"
fi
cat <<EOF

Everything of this run is in $(cd "$out" && pwd):
  curves.png      loss, learning rate, gradient norm, throughput; every expert's load, every layer's attention logits
  samples.md      text sampled while training
  metrics.jsonl   one JSON record a line
  checkpoints/    latest and best$longer
More text: $python generate.py $quoted --prompt "class" --stream
EOF
if [ $# -eq 0 ]; then  # or it was not the model of that contest
    for name in moe-gpt-debug moe-dense-debug moe-dense-7M-tokens; do
        contest="$(ls bench/results/*-contest-"$name".json | tail -n 1)"
        printf '\n%s\n' "$("$python" -m bench.verdict "$contest" | tail -n 2)"
    done
fi
