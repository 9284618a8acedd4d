#!/usr/bin/env bash
# Everything that a CUDA machine has to show, in parts. Their limits add up to under 9 minutes.
#
#   bench/gpu/run.sh --out DIR                    all parts
#   bench/gpu/run.sh steps minutes --out DIR      these alone; other parts in DIR stay
#   bench/gpu/run.sh --device cpu --tiny --out DIR    tiny models, as a test of the parts
#
# --limit SECONDS: the limit of each part that is named, in place of its own.
# DIR gets PART.json, log.txt, status.txt and table.md. 0 if all rows of all parts passed.
# PYTHON names the interpreter, python3 by default. README.md beside this file says what it needs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
ALL=(devices methods kernels steps minutes)
declare -A LIMITS=([devices]=60 [methods]=130 [kernels]=90 [steps]=180 [minutes]=60)
python=${PYTHON:-python3}
parts=()
out=
device=cuda
tiny=()
limit=

usage() {
    echo "$1; usage: bench/gpu/run.sh [${ALL[*]}] --out DIR [--device D] [--tiny] [--limit S]" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --out | --device | --limit)
            [[ $# -ge 2 ]] || usage "$1 has no value"
            case $1 in
                --out) out=$2 ;;
                --device) device=$2 ;;
                --limit) limit=$2 ;;
            esac
            shift
            ;;
        --tiny) tiny=(--tiny) ;;
        *)
            [[ -n ${LIMITS[$1]:-} ]] || usage "found no part $1"
            parts+=("$1")
            ;;
    esac
    shift
done
[[ -n $out ]] || usage "found no --out"
[[ -z $limit || $limit =~ ^[1-9][0-9]*$ ]] || usage "--limit is not a number of seconds"
((${#parts[@]})) || parts=("${ALL[@]}")
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
[[ $device == cpu ]] && export TRITON_INTERPRET=1

# One start of a part, with this many seconds. Python ends a little before the limit by itself.
start() {
    local part=$1 seconds=$2
    shift 2
    local arguments=(--out "$out/$part.json" --seconds "$((seconds > 20 ? seconds - 10 : seconds))")
    if [[ $part == kernels ]]; then
        [[ ${#tiny[@]} -gt 0 ]] && arguments+=(--models tiny --batches 2)
    else
        arguments+=(--device "$device" "${tiny[@]}" "$@")
    fi
    timeout -k 5 "$seconds" "$python" -m "gpu.$part" "${arguments[@]}" >>"$out/log.txt" 2>&1
}

# A part, started again behind its last row where its process ended before its time.
run_part() {
    local part=$1 seconds=$2 code began=$SECONDS
    rm -f "$out/$part.json"
    start "$part" "$seconds"
    code=$?
    for _ in 1 2 3 4 5; do
        local left=$((seconds - (SECONDS - began)))
        case $code in 0 | 2 | 4 | 124 | 137) break ;; esac
        [[ $part != kernels && -f $out/$part.json && $left -ge 15 ]] || break
        echo "== $part: ended with $code, goes on" >>"$out/log.txt"
        start "$part" "$left" --resume
        code=$?
    done
    echo "$part $code $((SECONDS - began))" >>"$out/status.txt"
    echo "$part: ended with $code after $((SECONDS - began)) s" >&2
    return "$code"
}

worst=0
for part in "${parts[@]}"; do
    echo "== $part" >>"$out/log.txt"
    run_part "$part" "${limit:-${LIMITS[$part]}}" || worst=1
done
"$python" -m gpu.table "$out" >"$out/table.md" || worst=1
sed -n '/^## what passed/,$p' "$out/table.md"
exit "$worst"
