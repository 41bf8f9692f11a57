#!/usr/bin/env bash
# Everything that a CUDA device is needed for, in order of value. Run it in the repository's root.
#
#   bash benchmarks/on_device.sh --pack           before: collect in .pack/ what a device without a network lacks
#   bash benchmarks/on_device.sh first            on the device: at most 480 s
#   bash benchmarks/on_device.sh second           on the device: what failed or is missing; at most 300 s
#   bash benchmarks/on_device.sh STEP...          these steps alone; at most 480 s
#   bash benchmarks/on_device.sh --rehearse [STEP...]   the commands of all steps on a CPU, tiny, in minutes
#   bash benchmarks/on_device.sh --list           the steps, what each does and may take
#
# A step that fails, hangs or is killed costs its own limit at most. After each, $OUT/results.tgz is made anew (OUT:
# ./device-results by default), so that what is done comes back whatever happens next. Then, at home:
# python -m benchmarks.bring_home results.tgz. PYTHON names the interpreter (python3 by default), SECONDS_IN_ALL
# another limit for the whole. Exit code 1 if a step failed, 143 if the script was told to stop.
set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
WIDTH=170 # characters of a log's line that are shown: a call shows less than 12,000 in all
GRACE=6   # seconds from SIGINT to SIGKILL
FIRST=(facts kernels alone tests table4 cells networks train)
SECOND=(again compiled kernels networks table4 cells train)
REHEARSAL=(facts kernels alone tests table4 cells networks train again compiled)

# Seconds at most, lines of the log to show, what it does.
declare -A LIMIT=([facts]=30 [kernels]=50 [alone]=45 [tests]=140 [table4]=150 [cells]=85 [networks]=115 [train]=45
  [again]=60 [compiled]=150)
declare -A LINES=([facts]=18 [kernels]=3 [alone]=8 [tests]=16 [table4]=5 [cells]=10 [networks]=2 [train]=1 [again]=12
  [compiled]=6)
declare -A WHAT=(
  [facts]="the device, versions, the source's commit, bgcbench doctor"
  [kernels]="our kernels compiled in parallel: the later steps find them in Triton's cache"
  [alone]="the gpu tests that time the device or look at all of its memory, one after the other"
  [tests]="the other gpu tests but the slowest, 12 at a time"
  [table4]="Table 4: bf16 and tf32 as graphs, fp32 and bf16 eager"
  [cells]="our kernels versus stock ones: the chosen cells of kernels_cuda"
  [networks]="WRN-28-10 and ResNet-50 with N = 4: inference and training steps"
  [train]="a training with the fast recipe, without torch.compile"
  [again]="the tests in .pack/again.txt, which bring_home writes: those that failed"
  [compiled]="the slowest gpu tests: whole networks under torch.compile"
)
ALONE="events_time or peak_is or environment_and or graph_computes or captured_training or every_time_and_in_a_graph"
SLOW="(networks_in_every_mode and compile) or (network_trains and fast)"

begin() { # SECONDS
  LIMIT_IN_ALL=$1 BEGUN=$SECONDS CHILD='' GUARD='' FAILED=0
  OUT=${OUT:-$PWD/device-results}
  WORK=$(mktemp -d) || exit 1
  FOUND=$WORK/found
  mkdir -p "$OUT" "$FOUND" || exit 1
  export PYTHONUNBUFFERED=1 NO_COLOR=1 TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  trap 'kill ${WATCH:-} 2> /dev/null; rm -rf "$WORK"' EXIT
  trap stopped INT TERM
}

left() { echo $((LIMIT_IN_ALL - GRACE - (SECONDS - BEGUN))); }

pack() { # a reader finds the old archive or the new one, never a part of one
  tar -czf "$OUT/.results.tgz" --exclude='*.checkpoints' --exclude='*.tmp' -C "$FOUND" . 2> /dev/null
  mv "$OUT/.results.tgz" "$OUT/results.tgz"
}

note() { echo "== $*" | tee -a "$FOUND/steps.txt"; }

end() { # what is left of the current step, its guard and all of their children
  kill -KILL -- "-$CHILD" "-$GUARD" 2> /dev/null
  CHILD=''
}

stopped() {
  trap '' INT TERM
  note "stopped after $((SECONDS - BEGUN)) s"
  pack
  if [ -n "$CHILD" ]; then
    kill -TERM "$CHILD" 2> /dev/null
    for _ in $(seq $((GRACE * 5))); do
      kill -0 "$CHILD" 2> /dev/null || break
      sleep 0.2
    done
    end
    pack
  fi
  exit 143
}

step() { # NAME LIMIT LINES COMMAND...
  local name=$1 most=$2 lines=$3 began=$SECONDS code cut=''
  shift 3
  # In the background, so that a signal to this script is answered at once; bash has SIGINT ignored there. In a session
  # of its own, so that the first process alone is asked to stop, once, and all of them can be killed. (timeout asks the
  # first one twice, and to bgcbench a second request means: leave at once.)
  setsid env --default-signal=INT "$@" > "$FOUND/$name.log" 2>&1 < /dev/null &
  CHILD=$!
  # shellcheck disable=SC2016 # its own arguments
  setsid bash -c 'sleep "$1"; touch "$4"; kill -INT "$2"; sleep "$3"; kill -KILL -- "-$2"' \
    guard "$most" "$CHILD" "$GRACE" "$WORK/cut" > /dev/null 2>&1 &
  GUARD=$!
  disown "$GUARD"
  wait "$CHILD" 2> /dev/null
  code=$?
  end
  [ -e "$WORK/cut" ] && cut=' (cut off)' && rm "$WORK/cut"
  [ "$code" -ne 0 ] && FAILED=1
  note "$name: exit code $code$cut, $((SECONDS - began)) s of $most, $(left) s left"
  tail -n "$lines" "$FOUND/$name.log" | cut -c "1-$WIDTH"
  pack
}

# The command of step $1, which may take $2 seconds, as the array COMMAND; empty where there is nothing to do.
command_of() {
  local seconds=$(($2 - 5)) device=cuda workers=12 small=() missing=()
  if [ "$MODE" = rehearse ]; then device=cpu workers=2 small=(--rehearse); fi
  if [ "$MODE" = second ]; then missing=(--missing-in results); fi
  local tests=("$PYTHON" -m pytest -o addopts= -m gpu -q -rfE --no-header --tb=short -p no:cacheprovider
    --junitxml "$FOUND/$1.xml")
  if "$PYTHON" -c 'import pytest_timeout' 2> /dev/null; then tests+=(--timeout $(($2 - 10))); fi
  local runs=(--folder "$FOUND" --device "$device" --seconds "$seconds" "${small[@]}" "${missing[@]}")
  case $1 in
    facts) COMMAND=("$PYTHON" -m benchmarks.facts --device "$device" --out "$FOUND/source.json") ;;
    kernels) COMMAND=("$PYTHON" -m benchmarks.compile_kernels --seconds "$seconds" "${small[@]}") ;;
    alone) COMMAND=("${tests[@]}" tests/test_gpu.py tests/kernels/test_kernels.py -k "$ALONE") ;;
    tests) COMMAND=("${tests[@]}" -n "$workers" --dist worksteal tests -k "not ($ALONE) and not ($SLOW)") ;;
    table4)
      COMMAND=("$PYTHON" -m benchmarks.table4_cuda "${runs[@]}" --only
        '*bf16-nhwc-graph,*tf32-nhwc-graph,*fp32-nchw-eager,*bf16-nhwc-eager')
      ;;
    cells)
      COMMAND=("$PYTHON" -m benchmarks.kernels_cuda --quick --seconds "$seconds" --out "$FOUND/kernels-cuda.json"
        "${small[@]}")
      [ "$MODE" = second ] && [ -e results/kernels-cuda.json ] && COMMAND=()
      ;;
    networks) COMMAND=("$PYTHON" -m benchmarks.networks_cuda "${runs[@]}" --only '*wrn_28_10*bf16*,*resnet50*bf16*') ;;
    train) COMMAND=("$PYTHON" -m benchmarks.train_cuda "${runs[@]}" --only '*wrn_28_10*fast-eager') ;;
    again)
      COMMAND=()
      local failed=()
      [ -s .pack/again.txt ] && mapfile -t failed < .pack/again.txt
      [ ${#failed[@]} -gt 0 ] && COMMAND=("${tests[@]}" -n 4 "${failed[@]}")
      ;;
    compiled) COMMAND=("${tests[@]}" -n 2 tests/test_gpu.py -k "$SLOW") ;;
  esac
}

# Wheels of what the device's Python lacks.
install_wheels() {
  "$PYTHON" -c 'import jsonschema, msgspec' 2> /dev/null && return
  timeout 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" .pack/wheels/*.whl \
    > "$FOUND/wheels.log" 2>&1 || note "jsonschema or msgspec is neither here nor in .pack/wheels: see wheels.log"
  export PYTHONPATH=$PYTHONPATH:$WORK/site
}

do_steps() { # STEP...
  local name most
  install_wheels
  if command -v nvidia-smi > /dev/null; then # read only: the device's settings are left as they are
    nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active \
      --format=csv,noheader -l 2 > "$FOUND/clocks.csv" 2>&1 &
    WATCH=$!
  fi
  for name in "$@"; do
    most=$(left)
    [ "$most" -gt "${LIMIT[$name]}" ] && [ "$MODE" != rehearse ] && most=${LIMIT[$name]}
    if [ "$most" -lt 12 ]; then
      note "$name: skipped, $most s left"
      continue
    fi
    command_of "$name" "$most"
    if [ ${#COMMAND[@]} -eq 0 ]; then
      note "$name: nothing to do"
      continue
    fi
    case "$MODE $name" in
      "rehearse kernels") export TRITON_INTERPRET=1 ;;
      *) unset TRITON_INTERPRET ;;
    esac
    step "$name" "$most" "${LINES[$name]}" "${COMMAND[@]}"
  done
  pack
  echo "results: $OUT/results.tgz"
  exit "$FAILED"
}

[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0 # a test reads the functions

MODE=${1:---help}
case $MODE in
  --help | -h) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" ;;
  --list)
    for name in "${REHEARSAL[@]}"; do printf '%-9s %3s s  %s\n' "$name" "${LIMIT[$name]}" "${WHAT[$name]}"; done
    echo "first: ${FIRST[*]}"
    echo "second: ${SECOND[*]}"
    ;;
  --pack) exec "$PYTHON" -m benchmarks.pack ;;
  *)
    steps=("$@") seconds=480
    case $MODE in
      first) steps=("${FIRST[@]}") ;;
      second) steps=("${SECOND[@]}") seconds=300 ;;
      --rehearse)
        MODE=rehearse steps=("${@:2}") seconds=1200
        [ $# -eq 1 ] && steps=("${REHEARSAL[@]}")
        ;;
    esac
    for name in "${steps[@]}"; do
      if [ -z "${LIMIT[$name]:-}" ]; then
        echo "on_device.sh: no step is called '$name'; choose from ${REHEARSAL[*]}, or first, second, --help" >&2
        exit 2
      fi
    done
    begin "${SECONDS_IN_ALL:-$seconds}"
    do_steps "${steps[@]}"
    ;;
esac
