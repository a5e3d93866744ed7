#!/bin/bash
# Both modules trained and evaluated on Slurm (20.11 or newer), one Ray node on each of two hosts of eight GPUs:
#
#   sbatch cluster/jobs/slurm.sh
#
# Edit the resources below to whole hosts of yours (no second Ray may run on a host), and the three paths after them, on
# storage that all hosts share. Before its time is up, or when it is preempted, the job is told, saves, and queues
# itself again; `scancel` ends it for good. Of a preemption it is told only where slurm.conf has a GraceTime, and
# send_user_signal in PreemptParameters (older: preempt_send_user_signal in SlurmctldParameters); else it goes on from
# the save before.
#SBATCH --job-name=ifvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ifvit-%j.log
set -u

VENV=/YOUR-SHARED/venv          # python -m venv VENV; VENV/bin/pip install ".[cuda]"
PRINTS=/YOUR-SHARED/prints
RUN=/YOUR-SHARED/run1           # checkpoints; the same RUN goes on from the newest

source "$VENV/bin/activate"
export IFVIT_CACHE="${IFVIT_CACHE:-$RUN/cache}"

# This script runs on the first host, which becomes Ray's head. Its address, not its name: that may mean 127.0.1.1 here.
# Set HEAD_IP where the first address is not the network that the hosts share.
address="${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}:$((20000 + SLURM_JOB_ID % 10000))"

# Whoever reaches Ray's ports and has no token is refused; srun hands the token to all hosts.
RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(umask 077; ray get-auth-token --generate 2>/dev/null)}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray-$UID}"         # on every host; a job's TMPDIR may be too long for Ray's sockets
export RAY_worker_niceness=0                            # not 15: the training is what these hosts are there for
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600       # 30 s are few where Python starts from a network disk

# Ray's own processes must outlive the notice, or nothing can be saved: it goes to the driver alone, by its number.
here="$(mktemp -d)"
told() {
  if [ -s "$here/pid" ]; then kill -TERM "$(cat "$here/pid")"
  else echo 75 > "$here/code"; kill -TERM "$step"; fi   # not begun yet: nothing to save
}

# Only the head runs what follows `--`. Its exit code goes through a file, since srun's is the highest of all hosts'.
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --wait=0 \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --disable-usage-stats -- \
  bash -c '"$@" & echo $! > "$0/pid"; wait $!; code=$?; echo $code > "$0/code"; exit $code' "$here" \
  env RAY_ADDRESS="$address" python -m ifvit.train_all --preset paper --devices gpu --runtime ray \
    --num_workers "$SLURM_JOB_NUM_NODES" --dataset_root "$PRINTS" \
    --dense_checkpoint_dir "$RUN/dense_reg" --matcher_checkpoint_dir "$RUN/matcher" &
step=$!
trap told TERM
while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done    # a notice ends `wait` before its time
trap '' TERM

[ -s "$here/code" ] && code="$(cat "$here/code")"
rm -rf "$here"
# 75: saved, run me again. Not after scancel, which also lets the run save: then the job is no longer RUNNING.
if [ "$code" = 75 ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
