# shellcheck shell=bash disable=SC2034
# What the three scripts share: where files lie, and how a step is run. They source it, with their
# argument: the folder below which they write.

[ $# = 1 ] || { echo "usage: [TINY=1] [PYTHON=python3] [WHEELS=runs/wheels] $0 FOLDER"; exit 2; }
script=$(basename "$0" .sh)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
wheels=$(realpath -m "${WHEELS:-$root/runs/wheels}")
out=$(mkdir -p "$1" && cd "$1" && pwd) && work=$out/work || exit 1
mkdir -p "$work"/{logs,done} && cd "$work" || exit 1
shopt -s nullglob
python=${PYTHON:-python3} failed=0 running=
end=570  # seconds after which nothing more is begun or goes on: ten minutes, less the packing
slack=1  # times as long as on a GPU machine a step may take
gpu=$(nvidia-smi -L 2>/dev/null | head -1)

export root work python PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX=$work/cache/python
export PYTHONPATH=$root:$work/site${PYTHONPATH:+:$PYTHONPATH} MPLCONFIGDIR=$work/cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR=$work/cache/inductor TRITON_CACHE_DIR=$work/cache/triton
export CUDA_CACHE_PATH=$work/cache/cuda

tiny="--hidden-dims 16 16 --num-critics 2 --flow-steps 2 --chunk-length 20 --batch-size 32"
tiny="$tiny --eval-episodes 1 --log-interval 20"
if [ -n "${TINY:-}" ]; then
  export OMP_NUM_THREADS=1 slack=4
  domain=pointmaze-medium-navigate episodes=2
  sizes="$tiny --bc-steps 100" updates=300
elif [ -z "$gpu" ]; then
  echo "$0 needs an NVIDIA GPU; TINY=1 runs its steps in miniature on a CPU"
  exit 2
else
  domain=scene-play episodes=1000 sizes='' updates=3000
fi
export domain episodes sizes tiny

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }

# The last line that a program left in a log.
last_line() { tr '\r' '\n' < "$1" | grep -v '^[[:space:]]*$' | tail -1 | cut -c1-160; }

# report NAME RESULT SECONDS [WORDS]: a line here, one in steps.csv.
report() {
  say "$1: $2, $3 s${4:+; $4}"
  [ -e "$out/steps.csv" ] || echo script,step,result,seconds > "$out/steps.csv"
  echo "$script,$1,$2,$3" >> "$out/steps.csv"
  case $2 in ok | skipped* | "still going on") ;; *) failed=1 ;; esac
}

# What a step has left behind, in its process group.
end_running() {
  [ -z "$running" ] || kill -KILL -- -"$running" 2> /dev/null
  running=
}

# step NAME SECONDS COMMAND...: runs it for at most so long, unless it succeeded in an earlier call.
step() {
  local name=$1 limit=$(($2 * slack)) began=$SECONDS
  [ $limit -le $((end - SECONDS)) ] || limit=$((end - SECONDS))
  local log=$work/logs/$script-$1.log result=ok status
  shift 2
  [ ! -e "done/$script-$name" ] || { say "$name: done in an earlier call"; return; }
  [ "$limit" -ge 5 ] || { report "$name" "no time left" 0; return; }
  say "$name: begins, at most $limit s"
  timeout --kill-after=10 "$limit" "$@" > "$log" 2>&1 < /dev/null &
  running=$!
  wait $running 2> /dev/null
  status=$?
  end_running
  case $status in
    0) touch "done/$script-$name" ;;
    124 | 137) result="out of time" ;;
    *) result=failed ;;
  esac
  report "$name" "$result" $((SECONDS - began)) "$(last_line "$log")"
}

# on_gpu NAME ...: a step that only a GPU can take.
on_gpu() {
  if [ -n "$gpu" ]; then step "$@"; else report "$1" "skipped: no GPU" 0; fi
}

install() {
  local find="from importlib.util import find_spec as there
raise SystemExit(not (there('ogbench') and there('tyro')))"
  "$python" -c "$find" && echo "everything is there" && return
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$wheels"/*.whl && "$python" -c "$find" && echo "installed"
}
export wheels
export -f install

# The data, and the cloned policy that all training starts from; goes on where it was.
prior() {
  echo $$ > prior.pid
  "$python" -c "
import common
workers = max(1, common.cores() - 4)
common.collect_dataset('$domain-v0', $episodes, 0, '$work/data', workers)" || return
  local run=(--run-dir "$work/bc")
  if [ -e bc/checkpoint.pt ] || [ -e bc/checkpoint_previous.pt ]; then
    run+=(--resume)
  else
    # shellcheck disable=SC2206 # flags are words
    run+=(--env-id "$domain-singletask-task1-v0" --collect-episodes "$episodes" --offline-steps 0
      --dataset-dir "$work/data" --checkpoint-interval 50000 $sizes)
  fi
  "$python" "$root/trqam_offline.py" "${run[@]}" && touch prior.done
}
export -f prior

# In a session of its own, so that it outlives the script that begins it. It holds a lock.
begin_prior() {
  exec 9> prior.lock
  if [ ! -e prior.done ] && flock --nonblock 9; then
    setsid nice bash -c prior >> logs/prior.log 2>&1 < /dev/null &
  fi
  exec 9>&-
}

# Cloning saves and ends; collecting keeps its whole episodes.
stop_prior() {
  flock --nonblock prior.lock true || kill -TERM -- -"$(cat prior.pid)"
  timeout 60 flock prior.lock true
}

# wait_for_prior SECONDS: 0 where the cloned policy is there by then.
wait_for_prior() {
  local began=$SECONDS
  say "prior: waits for data and cloned policy, at most $1 s"
  timeout "$1" flock prior.lock true
  if [ -e prior.done ]; then
    report prior ok $((SECONDS - began)) "$(tail -1 bc/eval.csv | cut -c1-160)"
  elif flock --nonblock prior.lock true; then
    report prior failed $((SECONDS - began)) "$(last_line logs/prior.log)"
  else
    report prior "still going on" $((SECONDS - began)) "$(last_line logs/prior.log)"
  fi
  [ -e prior.done ]
}

# Four processes then share the GPU at once. 1 where that does not work here.
start_mps() {
  export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/logs/mps
  mkdir -p "$work/mps" "$work/logs/mps"
  command -v nvidia-cuda-mps-control && nvidia-cuda-mps-control -d &&
    timeout 40 "$python" -c "import torch; print(torch.ones(2, device='cuda').sum())" && return
  stop_mps
  return 1
}
stop_mps() {
  local daemon=$work/mps/nvidia-cuda-mps-control.pid
  if [ -e "$daemon" ]; then
    echo quit | timeout 10 nvidia-cuda-mps-control || kill "$(cat "$daemon")"
  fi
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}
export -f start_mps stop_mps

# tables FILE...: csv files of the same columns as one, with where each row is from.
tables() {
  awk 'FNR > 1 { print FILENAME "," $0 } NR == 1 { print "from," $0 }' "$@"
}

# What is worth taking home, into one archive at the folder's top.
pack() {
  local run files=()
  end_running
  [ ! -e prior.done ] || files+=(bc/bc_checkpoint.pt)
  for run in bc *-task?; do
    [ ! -e "$run/config.json" ] || files+=("$run"/config.json "$run"/*.csv "$run"/*.png)
  done
  tar czf "$out/gpu.tgz" --ignore-failed-read logs "${files[@]}" 2> /dev/null
  say "$out/gpu.tgz: $(du -h "$out/gpu.tgz" | cut -f1)"
}
trap pack EXIT
