# Sourced by the .sbatch files: `run_on_nodes ARGS` starts launchers/node.py once on each node of the job and, when the run has been
# stopped by a signal (code 75), queues the job again: it resumes from its last checkpoint.
# The interpreter is that of VENV (default: .venv of the checkout), else python3 of the PATH. `%a` in ARGS is the job array's index.
run_on_nodes() {
  local python=${VENV:-$PWD/.venv}/bin/python code=0
  [ -x "$python" ] || python=python3
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it over
  set -- srun --kill-on-bad-exit=1 --wait=20 --ntasks-per-node=1 "$python" -u launchers/node.py "${@//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: start this by sbatch; it would run: $*" >&2
    return 2
  fi
  echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"
  "$@" || code=$?
  if [ "$code" = 75 ]; then
    echo "job $SLURM_JOB_ID was stopped by a signal and has saved: it is queued again"
    # The number of an array's last task is that of the whole array: queue this task, not all of them.
    if scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; then
      sleep 60 # until Slurm ends this script: its own end would now count as the end of the job
    else
      echo "error: it cannot be queued again; submit the same command: it resumes" >&2
    fi
  fi
  return "$code"
}
