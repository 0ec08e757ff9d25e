#!/usr/bin/env bash
# How fast is it? Alone on the machine: a background job of 1_check.sh is waited for, then stopped.
source "$(dirname "$0")/steps.sh"

if [ -n "${TINY:-}" ]; then
  widths="16" batches="16" modes="off" agents="1 2" transitions=20000 seconds=0.2
  evaluation="--env-id $domain-singletask-task1-v0 --episodes 2"
else
  widths="512 1024" batches="256" modes="off on" agents="1 2 4 8" transitions=100000000 seconds=5
  evaluation="--episodes 50"
fi

# speed NAME SECONDS FLAGS...
speed() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" "$root/benchmarks/speed.py" --seconds $seconds \
    --output "$work/speed/$name.csv" "$@"
}

# shellcheck disable=SC2086 # these are words
measure() {
  local updates="--measure updates --widths $widths --batches $batches --compile $modes"
  local together="--measure agents --widths ${widths%% *} --compile ${modes##* } --agents $agents"
  speed float32 190 $updates
  speed tf32 140 $updates --tf32
  speed agents_tf32 80 $together --tf32
  speed data 60 --measure data parts --widths ${widths%% *} --transitions $transitions
  speed evaluation 90 --measure evaluation start --widths ${widths%% *} $evaluation
  speed agents_float32 60 $together
}

step install 60 bash -c install
begin_prior
wait_for_prior 120 || stop_prior
mkdir -p speed
measure
tables speed/*.csv > "$out/speed.csv"
exit $failed
