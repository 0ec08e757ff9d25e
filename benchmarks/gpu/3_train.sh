#!/usr/bin/env bash
# How does it learn? TRQAM and QAM on two tasks, from one cloned policy; goes on in each call.
source "$(dirname "$0")/steps.sh"

interval=10000
flags="--tf32 --compile on"
[ -z "${TINY:-}" ] || interval=100 flags="--compile off"

# train SECONDS SCRIPT TASK: goes on with a run for so long.
train() {
  local name=$2-task$3 began=$SECONDS log=$work/logs/$2-task$3.log result run
  run=(--run-dir "$work/$name")
  if [ -e "$name/checkpoint.pt" ] || [ -e "$name/checkpoint_previous.pt" ]; then
    run+=(--resume)
  else
    # shellcheck disable=SC2206 # flags are words
    run+=(--env-id "$domain-singletask-task$3-v0" --collect-episodes "$episodes"
      --dataset-dir "$work/data" --bc-checkpoint "$work/bc/bc_checkpoint.pt"
      --eval-interval $interval --checkpoint-interval $interval $flags $sizes)
  fi
  say "$name: begins, saves and ends after $1 s"
  # To the program alone: its workers then end as it wants them to.
  timeout --foreground --kill-after=30 "$1" "$python" "$root/$2.py" "${run[@]}" \
    >> "$log" 2>&1 < /dev/null
  case $? in
    0 | 124) result=ok ;;
    *) result=failed ;;
  esac
  grep -qs ^offline "$name/train.csv" || result="failed: it came to no update"
  report "$name" "$result" $((SECONDS - began)) "train: $(progress "$name/train.csv" charts/SPS);\
 eval: $(progress "$name/eval.csv" success)"
  [ "$result" = ok ]
}

# progress FILE COLUMN: stage, step and a column of a table's last row.
progress() {
  [ -e "$1" ] || return
  awk -F, -v name="$2" 'NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) column = i }
    END { print $1, $2 ", " name, $column }' "$1"
}

# together SECONDS TASK...: both algorithms on these tasks at once.
together() {
  local seconds=$1 task name ids=() id
  shift
  for task; do
    for name in trqam_offline qam_baseline; do
      train "$seconds" $name "$task" &
      ids+=($!)
    done
  done
  for id in "${ids[@]}"; do wait "$id" || failed=1; done
}

step install 60 bash -c install
begin_prior
wait_for_prior 400 || exit 1
stop=540  # seconds after which a run is asked to save and end
[ -z "${TINY:-}" ] || stop=$((SECONDS + 140))
if [ -n "$gpu" ] && start_mps > logs/mps.log 2>&1; then
  trap 'stop_mps; pack' EXIT
  together $((stop - SECONDS)) 1 3
else
  say "no MPS here: two at a time"
  together $(((stop - SECONDS) / 2 - 5)) 1
  together $((stop - SECONDS)) 3
fi
tables bc/eval.csv ./*-task?/eval.csv > "$out/eval.csv"
exit $failed
