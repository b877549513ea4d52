#!/usr/bin/env bash
# All that is to be measured on one GPU, in one command. About half an hour on an H100, without the training at the end.
#
#   bash bench/gpu.sh                                    tables to the screen, JSON and logs to docs/results/gpu
#   DATA=/path/to/data EPOCHS=10 bash bench/gpu.sh       and train both architectures' 10B on the real CIFAR-100
#   bash bench/gpu.sh --toy                              the same commands on a CPU, at toy size: do they work?
#
# PYTHON names the interpreter, OUT the folder. A bar that is missed does not stop what follows; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-docs/results/gpu}
toy=
[ "${1:-}" = --toy ] && toy=yes
mkdir -p "$OUT"
failed=

run() { # name, command …
    local name=$1
    shift
    echo
    echo "== $name: $*"
    "$@" 2> >(tee "$OUT/$name.err" >&2) | tee "$OUT/$name.log"
    [ "${PIPESTATUS[0]}" = 0 ] && return
    # At toy size a bar means nothing: what counts is that there is a result.
    [ -n "$toy" ] && [ -s "$OUT/$name.json" ] && return
    failed="$failed $name"
}

if [ -n "$toy" ]; then
    cpu=(--device cpu)
    run tests "$PYTHON" -m pytest -q tests/test_gpu.py tests/test_differential_forms.py
    run attention "$PYTHON" -m bench.attention "${cpu[@]}" --rounds 2 --json "$OUT/attention.json"
    run step "$PYTHON" -m bench.step "${cpu[@]}" --rounds 2 --steps 1 --depth 1 --images 2 --compiled --json "$OUT/step.json"
    run data "$PYTHON" -m bench.data "${cpu[@]}" --rounds 2 --json "$OUT/data.json"
    run memory "$PYTHON" -m bench.cells "${cpu[@]}" --toy --size 10B --cap_gb 24 --json "$OUT/memory.json"
    epochs=(--max_steps 1 --batch_size 4)
else
    nvidia-smi | tee "$OUT/nvidia-smi.log"
    cpu=()
    run tests "$PYTHON" -m pytest -q tests/test_gpu.py tests/test_differential_forms.py
    run attention "$PYTHON" -m bench.attention --json "$OUT/attention.json"
    run step "$PYTHON" -m bench.step --json "$OUT/step.json"
    run data "$PYTHON" -m bench.data ${DATA:+--data_root "$DATA"} --json "$OUT/data.json"
    run memory "$PYTHON" -m bench.cells --size 50B --cap_gb 24 --steps 3 --json "$OUT/memory.json"
    run recompute "$PYTHON" -m bench.cells --size 50B --cap_gb 24 --steps 3 --recompute --json "$OUT/recompute.json"
    run cells "$PYTHON" -m bench.cells --json "$OUT/cells.json"
    epochs=(--epochs "${EPOCHS:-5}")
fi
if [ -n "${DATA:-}" ]; then
    for model in vit_classic vit_differential; do
        run "train-$model" "$PYTHON" run.py train --model "$model" --size 10B --dataset CIFAR-100 "${epochs[@]}" "${cpu[@]}" \
            --data_root "$DATA" --checkpoints "$OUT/checkpoints"
    done
    cp "$OUT"/checkpoints/*/*_training.log "$OUT"/checkpoints/*/*_result.json "$OUT"/
fi
echo
[ -z "$failed" ] && echo "nothing failed; results in $OUT" || echo "failed or missed:$failed; results in $OUT"
[ -z "$failed" ]
