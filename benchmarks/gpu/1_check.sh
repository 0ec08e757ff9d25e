#!/usr/bin/env bash
# Does it run here? Meanwhile data is collected and cloned, in the background. See README.md.
# shellcheck disable=SC2329 # the functions are called by way of bash -c
source "$(dirname "$0")/steps.sh"

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  grep -m1 "model name" /proc/cpuinfo
  command -v gcc
  "$python" -m pip list 2> /dev/null |
    grep -iE "^(torch|triton|numpy|tensorboard|ogbench|gymnasium|mujoco) "
  "$python" -c "
import platform, torch, common
device = common.choose_device('auto')
gpu = torch.cuda.get_device_name() if device.type == 'cuda' else 'no GPU'
print(f'Python {platform.python_version()}, torch {torch.__version__}, {gpu}, {common.cores()} cores')
raise SystemExit('$gpu' != '' and device.type != 'cuda')"
}

mps() {
  if start_mps; then stop_mps; echo "MPS can be started"; else echo "MPS cannot be started"; fi
}

graph() {
  "$python" "$root/benchmarks/speed.py" --measure updates --widths 512 --batches 256 --seconds 1 \
    --output graph.csv && [ "$(grep -c "as a graph" graph.csv)" = 2 ]
}

# A run is stopped by SIGTERM in its last stage, which saves, and resumed.
stop_and_resume() {
  local steps=$1 run=(--run-dir "$work/tiny") pid
  rm -rf tiny
  # shellcheck disable=SC2086 # flags are words
  "$python" "$root/trqam_offline.py" quick --env-id pointmaze-medium-navigate-singletask-task1-v0 \
    --collect-episodes 2 --dataset-dir "$work/data" --bc-steps 50 --offline-steps "$steps" \
    $tiny "${run[@]}" &
  pid=$!
  until grep -qs ^offline tiny/train.csv; do sleep 0.1; kill -0 "$pid" 2> /dev/null || return; done
  kill -TERM "$pid"
  wait "$pid"
  [ $? = 143 ] || return
  tail -1 tiny/train.csv
  "$python" "$root/trqam_offline.py" --resume "${run[@]}" && grep "^offline,$steps," tiny/train.csv
}
export gpu
export -f facts mps graph stop_and_resume

step install 60 bash -c install
step facts 60 bash -c facts
on_gpu mps 60 bash -c mps
begin_prior
on_gpu graph 90 bash -c graph
on_gpu tests 330 "$python" -m pytest -q -p no:cacheprovider -k cuda --durations=5 \
  "$root"/tests/test_cuda_graph.py "$root"/tests/test_parity.py
step stop_and_resume 90 bash -c "stop_and_resume $updates"
wait_for_prior $((end - SECONDS))
exit $failed
