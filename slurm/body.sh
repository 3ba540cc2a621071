# shellcheck shell=bash
# What the job scripts of this folder share. A script sources this file and calls
#     run_job NAME RECIPE DS_CONFIG "$@"
# Each rank is one srun task running dsquant/train.py; the script's own arguments go there, after the defaults they replace.
# The same job started again (by a requeue, or by another sbatch with its --out_dir) continues where it stopped.

readonly STOPPED=75          # exit code of train.py: stopped by a signal, at a step boundary, what is needed on disk
readonly UNHEARD="138 143"   # killed by USR1 or TERM before Python was listening
readonly MAX_IDLE=3          # starts in a row that may be stopped before they have saved anything

say() { printf 'dsquant: %s\n' "$*"; }

fail() {
  printf 'dsquant: %s\n' "$*" >&2
  exit 2
}

# Print the last value that --KEY (KEY with underscores) has among the arguments after it, and return 1 where it has none.
value_of() {
  local wanted=$1 found="" status=1 name
  shift
  while [ $# -gt 0 ]; do
    name=${1%%=*}
    if [ "${name//-/_}" = "__$wanted" ]; then
      if [[ $1 == *=* ]]; then
        found=${1#*=} status=0
      elif [ $# -gt 1 ]; then
        found=$2 status=0
      fi
    fi
    shift
  done
  [ $status -eq 0 ] && printf '%s\n' "$found"
  return $status
}

choose_python() {
  python=${DSQUANT_PYTHON:-$root/.venv/bin/python}
  [ -x "$python" ] || fail "no Python at $python: run 'make venv' in $root, or set DSQUANT_PYTHON"
  export PATH="${python%/*}:$PATH" # DeepSpeed compiles with the ninja that lies beside it
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  if [ -d "$root/.venv" ]; then
    export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}"
  fi
}

# Set what the ranks need to find and keep each other. dsquant/launcher.py reads the rest from the step.
set_network() {
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT # of a shell that submitted this
  if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then # rank 0 is on the first node; NodeAddr is how Slurm itself reaches it
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=${address:-$first}
  fi
  if [ -n "${DSQUANT_IFNAME:-}" ]; then
    export NCCL_SOCKET_IFNAME=$DSQUANT_IFNAME GLOO_SOCKET_IFNAME=$DSQUANT_IFNAME
  fi
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # where a rank is lost, the rest end
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# Put this job back into the queue, unless it has been stopped again and again before it could save anything.
requeue() {
  local out_dir=$1 logs=$2 idle=0 state
  if [ -z "$(find "$out_dir" -path '*/step_*/manifest.json' -newer "$logs/began" -print -quit)" ]; then
    [ -f "$out_dir/logs/idle_starts" ] && idle=$(<"$out_dir/logs/idle_starts")
    idle=$((idle + 1))
  fi
  echo "$idle" >"$out_dir/logs/idle_starts"
  if [ "$idle" -ge "$MAX_IDLE" ]; then
    say "$idle starts in a row were stopped before they saved anything: not requeued."
    say "Give the job a --time well above the lead of --signal, then sbatch it again with --out_dir $out_dir"
    return
  fi
  state=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z]*\).*/\1/p')
  if [ "$state" != RUNNING ]; then
    say "the job is $state: not requeued; continue with sbatch and --out_dir $out_dir"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "requeued; it will continue by itself"
  else
    say "this cluster does not requeue: continue with sbatch and --out_dir $out_dir"
  fi
}

run_job() {
  local name=$1 recipe=$2 ds_config=$3 id seed out_dir logs code
  local -a options=()
  shift 3
  [ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job script: sbatch slurm/$name.sh"
  id=$SLURM_JOB_ID
  value_of recipe "$@" >/dev/null || options+=(--recipe "$recipe")
  value_of ds_config "$@" >/dev/null || options+=(--ds_config "$root/ds_configs/$ds_config")
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # an array is one run a seed
    id=$SLURM_ARRAY_JOB_ID/seed_$SLURM_ARRAY_TASK_ID
    seed=$(value_of seed "$@") || options+=(--seed "$SLURM_ARRAY_TASK_ID")
    [ -z "${seed:-}" ] || id=$SLURM_ARRAY_JOB_ID/task_$SLURM_ARRAY_TASK_ID
  fi
  out_dir=$(value_of out_dir "$@") || { out_dir=runs/$name-$id && options+=(--out_dir "$out_dir"); }
  [ ! -s "$out_dir/metrics.jsonl" ] || options+=(--resume)
  logs=$out_dir/logs/$SLURM_JOB_ID-start${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs" || fail "cannot write to $out_dir"
  : >"$logs/began"
  choose_python
  set_network

  local -a srun=(srun --export=ALL --distribution=block --open-mode=append "--output=${logs//%/%%}/rank_%t.log")
  # A rank that ends takes the others along within 60 s; not at once, for ranks that stop together do not end at the same instant.
  srun+=(--kill-on-bad-exit=0 --wait=60)
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # since 22.05 not inherited
  say "$(date '+%F %T') job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST"
  say "run folder $out_dir, logs $logs/rank_N.log"
  say "train.py ${options[*]} $*"
  "${srun[@]}" "$python" "$root/dsquant/train.py" "${options[@]}" "$@"
  code=$?
  say "$(date '+%F %T') ended with exit code $code"
  if [ "$code" -ne 0 ]; then
    grep -h '^dsquant:' "$logs"/rank_*.log | sort -u
  fi
  case " $STOPPED $UNHEARD " in
    *" $code "*) requeue "$out_dir" "$logs" ;; # Slurm may end this script from here on
  esac
  exit "$code"
}
