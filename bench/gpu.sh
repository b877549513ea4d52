#!/usr/bin/env bash
# All that is to be measured on one GPU, in one command: at most ten minutes on an H100 or H200, what is worth most first.
#
#   bash bench/gpu.sh                                    tables to the screen and to a log, JSON: all in docs/results/gpu
#   bash bench/gpu.sh --only cells --only step           these parts only
#   DATA=/path/to/data EPOCHS=10 bash bench/gpu.sh       and then train both architectures' 10B on the real CIFAR-100
#   bash bench/gpu.sh --toy                              the same commands on a CPU, at toy size: do they work?
#
# The parts, each with the seconds after which it is cut:
#   tests 120       is it right?
#   cells 150       a step of each of the twelve cells, and the hours of the grid
#   step 80         a step of both architectures beside timm's
#   compiled 100    and of the classic one beside timm's ViT, compiled
#   attention 40    the forms of differential attention
#   memory 75       the 50M models at batch 512, with all memory and with 24 GB
#   data 25         the data's way to the model
#   train 900       an architecture on real CIFAR-100; not within the ten minutes
#   slow 400        gradients and losses of blocks that torch.compile compiles; only where it is asked for by --only
#
# PYTHON names the interpreter, OUT the folder, LIMIT other seconds for every part, for a slower GPU. A part that is cut, fails or misses
# a bar does not stop the others; the exit code is then 1. What a part had measured by then is in its JSON.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python}
OUT=${OUT:-docs/results/gpu}
parts="tests cells step compiled attention memory data train slow"
toy= only= unwell= running=
while [ $# -gt 0 ]; do
    case $1 in
        --toy) toy=yes ;;
        --only)
            if [[ " $parts " != *" ${2:-none} "* ]]; then
                echo "there is no part '${2:-}': give one of $parts" >&2
                exit 2
            fi
            only="$only $2 "
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' bench/gpu.sh
            exit
            ;;
        *)
            echo "'$1' is no option: bash bench/gpu.sh --help lists them" >&2
            exit 2
            ;;
    esac
    shift
done
if [[ $only == *" train "* && -z ${DATA:-} ]]; then
    echo "train needs the data: DATA=/path/to/data bash bench/gpu.sh --only train" >&2
    exit 2
fi
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
exec > >(tee -i -a "$OUT/gpu.log") 2>&1
log=$!
trap 'code=$?; exec >&- 2>&-; wait $log; exit $code' EXIT
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM

part() { # name, seconds, command …
    local name=$1 limit=${LIMIT:-$2} json="$OUT/$1.json" code verdict
    shift 2
    [[ -z $only || $only == *" ${name%%-*} "* ]] || return 0
    rm -f "$json"
    printf '\n== %s, at most %s s: %s\n' "$name" "$limit" "$*"
    # timeout ends all processes of the part; it is waited for in the background, so that Ctrl-C ends it too.
    timeout --kill-after=5 "$limit" "$@" &
    running=$!
    wait "$running"
    code=$? running=
    case $code in
        0) return ;;
        124 | 137) verdict="cut after $limit s" ;;
        *)
            verdict="failed"
            if grep -qs '"complete": true' "$json"; then
                [ -z "$toy" ] || return 0 # at toy size a bar means nothing: what counts is that there is a result
                verdict="missed a bar"
            fi
            ;;
    esac
    [ ! -s "$json" ] || verdict="$verdict; what was measured is in $json"
    echo "== $name: $verdict"
    unwell="$unwell"$'\n'"   $name: $verdict"
}

bench() { # name, seconds, benchmark, options …
    part "$1" "$2" "$PYTHON" -m "bench.$3" "${device[@]}" "${@:4}" --json "$OUT/$1.json"
}

if [ -n "$toy" ]; then
    LIMIT=${LIMIT:-600}
    device=(--device cpu)
    part tests 0 "$PYTHON" -m pytest tests/test_gpu.py tests/test_differential_forms.py
    bench cells 0 cells --toy --size 10B
    bench step 0 step --rounds 2 --steps 1 --depth 1 --images 2 --no-compiled --only_arms
    bench compiled 0 step --rounds 2 --steps 1 --depth 1 --images 2 --only_compiled
    bench attention 0 attention --rounds 2
    bench memory 0 cells --toy --size 10B --dataset CIFAR-100 --cap_gb 24 --compare_uncapped
    bench data 0 data --rounds 2
    epochs=(--max_steps 1 --batch_size 4)
else
    device=()
    nvidia-smi
    part tests 120 "$PYTHON" -m pytest tests/test_gpu.py
    bench cells 150 cells
    bench step 80 step --no-compiled --only_arms
    bench compiled 100 step --only_compiled
    bench attention 40 attention
    bench memory 75 cells --size 50B --dataset CIFAR-100 --steps 5 --cap_gb 24 --compare_uncapped
    bench data 25 data ${DATA:+--data_root "$DATA"}
    epochs=(--epochs "${EPOCHS:-5}")
fi
if [[ $only == *" slow "* ]]; then
    part slow 400 "$PYTHON" -m pytest -m slow tests/test_gpu.py
fi
if [ -n "${DATA:-}" ]; then
    for model in classic differential; do
        part "train-$model" 900 "$PYTHON" run.py train --model "vit_$model" --size 10B --dataset CIFAR-100 "${epochs[@]}" "${device[@]}" \
            --data_root "$DATA" --checkpoints "$OUT/checkpoints"
    done
    [[ -n $only && $only != *" train "* ]] || cp "$OUT"/checkpoints/*/*_training.log "$OUT"/checkpoints/*/*_result.json "$OUT"/
fi
echo
[ -z "$unwell" ] && echo "nothing failed; results in $OUT" || echo "not as it should be, with results in $OUT:$unwell"
[ -z "$unwell" ]
