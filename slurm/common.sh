# The sbatch files source this file and call `launch ENTRY_POINT FLAGS...`.
#
# LAUNCHER=srun (default) starts one task per GPU; the processes find each other through SLURM's variables.
# LAUNCHER=torchrun starts one agent per node, which starts the processes of the node.
# PYTHON is the interpreter [.venv/bin/python, else python3]. MAX_REQUEUES is how often a job may be requeued [50].
#
# At the time limit, SLURM sends SIGUSR1 (--signal in the sbatch files) to every process of the step, not to this shell.
# The training then writes a checkpoint and exits with status 75; the job is requeued and continues from the checkpoint.

STOPPED=75

launch() {
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        echo "slurm: this is for sbatch; without SLURM start python $1 itself, or torchrun" >&2
        exit 2
    fi
    if [ ! -f "$1" ]; then  # no clone: the command `avion` of the installed package
        local command=${1#main_}
        command=${command%.py}
        shift
        set -- -m avion "${command//_/-}" "$@"
    fi
    local python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
    fi
    # Since SLURM 22.05, srun no longer takes the number of CPUs per task from sbatch.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    local status=0
    case ${LAUNCHER:-srun} in
        srun) with_srun "$python" "$@" || status=$? ;;
        torchrun) with_torchrun "$python" "$@" || status=$? ;;
        *)
            echo "slurm: LAUNCHER=$LAUNCHER is neither srun nor torchrun" >&2
            exit 2
            ;;
    esac
    requeue_or_exit "$status"
}

# --wait: if a process dies, the other processes have this many seconds to notice. srun exits with their largest status.
with_srun() {
    srun --wait=120 "$@"
}

with_torchrun() {
    local python=$1 per_node=${SLURM_NTASKS_PER_NODE:-1} nodes=$SLURM_JOB_NUM_NODES
    shift
    export SRUN_CPUS_PER_TASK=$((SRUN_CPUS_PER_TASK * per_node))
    local head
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # torchrun turns every failure into status 1; avion.engine.torchrun exits with the status of its processes.
    srun --wait=120 --ntasks="$nodes" --ntasks-per-node=1 "$python" -m avion.engine.torchrun \
        --nnodes="$nodes" --nproc-per-node="$per_node" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
        --rdzv-endpoint="$head:$((15000 + SLURM_JOB_ID % 15000))" "$@"
}

# Status 75 requeues the job, unless the job was requeued too often. Every other status ends the job.
requeue_or_exit() {
    local status=$1 before=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-50}
    if [ "$status" -ne "$STOPPED" ]; then
        exit "$status"
    fi
    if [ "$before" -ge "$most" ]; then
        echo "slurm: stopped by a signal again, after $before requeues; MAX_REQUEUES=$most, so the job ends here." \
            "Submit the same command again to go on from its checkpoint" >&2
        exit "$status"
    fi
    echo "slurm: stopped by a signal with a checkpoint; requeueing job $SLURM_JOB_ID ($((before + 1)) of at most $most times)"
    # SLURM ends this shell. If the shell exited before, SLURM would count the job as failed.
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
    exit "$status"
}
