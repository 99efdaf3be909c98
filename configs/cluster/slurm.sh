#!/usr/bin/env bash
# A Ray cluster inside a Slurm allocation, one sweep on it, and nothing left behind.
#   sbatch configs/cluster/slurm.sh SWEEP.yaml /shared/runs/SWEEP.zarr [more arguments of stepscope run]
# Needs bash 4.4, stepscope on PATH, and a home directory that all nodes share (or STEPSCOPE_SHARED=/such/a/folder).
# Before the time limit or a preemption it drains the running units and is queued again: the next start resumes.
# Stop for good, so that it can be resumed: stepscope cancel /shared/runs/SWEEP.zarr. See docs/cluster.md.
#SBATCH --job-name=stepscope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=stepscope-%j.log
set -euo pipefail

config=${1:?give a config and a store: sbatch slurm.sh SWEEP.yaml /shared/runs/SWEEP.zarr}
store=${2:?give a store on storage that all nodes share}
shift 2
drain_s=90          # less than the notice above
start_s=300

# A token of this job's own, readable by this user alone, gone with the job. It is never an argument: those are public.
private=$(umask 077 && mktemp -d "${STEPSCOPE_SHARED:-$HOME}/.stepscope-$SLURM_JOB_ID-XXXXXX")
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$private/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 RAY_USAGE_STATS_ENABLED=0

steps=()
driver=
told=
# Ray is ended by ending its steps: its own command for that would end every Ray of this user on a shared node.
finish() {
    trap - EXIT
    if ((${#steps[@]})); then
        kill -TERM "${steps[@]}" 2> /dev/null || true
        wait "${steps[@]}" 2> /dev/null || true
    fi
    rm -rf "$private"
}
tell() {
    told=yes
    if [[ -n $driver ]]; then kill -TERM "$driver" 2> /dev/null || true; else exit 143; fi
}
trap finish EXIT
trap tell TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address)
address=${address%% *}
# Jobs may share a node, so that each has ports and folders of its own.
port=$((20000 + SLURM_JOB_ID % 8000 * 4))
# Steps do not inherit the CPUs of a task.
step=(--overlap --export=ALL "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
common=(--block --disable-usage-stats "--num-cpus=${SLURM_CPUS_PER_TASK:-1}" "--dashboard-agent-listen-port=$((port + 1))")

srun --nodes=1 --ntasks=1 --nodelist="$head_node" "${step[@]}" \
    ray start --head "--node-ip-address=$address" "--port=$port" --dashboard-host=127.0.0.1 \
    "--dashboard-port=$((port + 2))" "--ray-client-server-port=$((port + 3))" \
    "--temp-dir=/tmp/stepscope-$SLURM_JOB_ID" "${common[@]}" &
steps+=($!)

export RAY_ADDRESS="$address:$port"
deadline=$((SECONDS + start_s))
until ray status > /dev/null 2>&1; do
    if ((SECONDS > deadline)) || ! kill -0 "${steps[0]}" 2> /dev/null; then
        echo "the head of Ray did not start on $head_node" >&2
        exit 1
    fi
    sleep 2
done

others=$((${#nodes[@]} - 1))
if ((others)); then
    srun "--nodes=$others" "--ntasks=$others" --exclude="$head_node" "${step[@]}" \
        ray start "--address=$RAY_ADDRESS" "${common[@]}" &
    steps+=($!)
fi

stepscope run "$config" --store "$store" --replicas $((${#nodes[@]} * ${SLURM_GPUS_ON_NODE:-1})) \
    --set run.gpus_per_replica=1 --set "run.drain_s=$drain_s" --set "run.capacity_wait_s=$start_s" "$@" &
driver=$!
code=0
wait "$driver" || code=$?
# A signal to this script ends the wait and not the driver, which drains.
while kill -0 "$driver" 2> /dev/null; do
    code=0
    wait "$driver" || code=$?
done
finish
if [[ -n $told ]] && ((code == 130)); then
    scontrol requeue "$SLURM_JOB_ID" || echo "queue it again by hand: it resumes" >&2
fi
exit "$code"
