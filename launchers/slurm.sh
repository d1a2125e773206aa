# Sourced by the .sbatch files: `run_on_nodes ARGS` starts launchers/node.py once on each node of the job and, if a signal has stopped
# the run (code 75), requeues the job, which then resumes from its last checkpoint.
# The interpreter is that of VENV (default: .venv in the checkout), else python3 in PATH. `%a` in ARGS is the index of an array's task.
run_on_nodes() {
  local python=${VENV:-$PWD/.venv}/bin/python code=0
  [ -x "$python" ] || python=python3
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not inherit it
  set -- srun --kill-on-bad-exit=1 --wait=20 --ntasks-per-node=1 "$python" -u launchers/node.py "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: start this by sbatch; it would run: $*" >&2
    return 2
  fi
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
  "$@" || code=$?
  if [ "$code" = 75 ]; then
    echo "job $SLURM_JOB_ID was stopped by a signal and has saved: it is queued again"
    # The job number of an array's last task is that of the whole array: requeue this task, not all of them.
    if scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; then
      sleep 60 # until Slurm ends this script: exiting by itself would count as the end of the job
    else
      echo "error: job $SLURM_JOB_ID cannot be requeued; submit the same command to resume" >&2
    fi
  fi
  return "$code"
}

# `run_tasks ARGS` starts ARGS as several tasks on each node of the job, one for each GPU or PROCESSES_PER_NODE, which share the work by
# files: if a task or a node dies, the others continue and do its work.
run_tasks() {
  local python=${VENV:-$PWD/.venv}/bin/python tasks=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  [ -x "$python" ] || python=python3
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  set -- srun --no-kill --kill-on-bad-exit=0 --wait=0 --overcommit --ntasks-per-node="$tasks" \
    --ntasks=$((tasks * ${SLURM_JOB_NUM_NODES:-1})) "$python" -u "$@"
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: start this by sbatch; it would run: $*" >&2
    return 2
  fi
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
  "$@"
}
