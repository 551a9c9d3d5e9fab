#!/usr/bin/env bash
# Proves the Slurm profile on one machine: Debian's Slurm without systemd, two worker slots, the tests' loopback hub.
# The same sweep runs locally and through Slurm; the result files must be equal, byte for byte.
#     apt-get install slurm-wlm munge && make proofs     (as root; it stops what it started)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export PATH=$(dirname "$python"):$PATH
for tool in munged slurmctld slurmd; do
  command -v "$tool" >/dev/null || { echo "$tool: not here; apt-get install slurm-wlm munge" >&2; exit 1; }
done
conf=/etc/slurm/slurm.conf  # where job steps look: Snakemake passes on no variable of Slurm's
[ ! -e $conf ] || { echo "$conf: this machine has a Slurm already; use it" >&2; exit 1; }
work=$(mktemp -d)
chmod 755 "$work"
pids=()
finish() {
  status=$?
  [ $status = 0 ] || tail -n 20 "$work"/*.log >&2
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  rm -rf "$work" $conf
  exit $status
}
trap finish EXIT

install -d -o munge -g munge -m 755 "$work/munge"
dd if=/dev/urandom of="$work/munge/key" bs=1 count=1024 status=none
chown munge:munge "$work/munge/key"
chmod 400 "$work/munge/key"
runuser -u munge -- munged --foreground --key-file="$work/munge/key" --socket="$work/munge/socket" \
  --log-file="$work/munge/log" --pid-file="$work/munge/pid" --seed-file="$work/munge/seed" >"$work/munged.log" 2>&1 &
pids+=($!)

host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1100)}' /proc/meminfo)
mkdir "$work/state" "$work/spool"
mkdir -p /etc/slurm
cat >$conf <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=$memory State=UNKNOWN
PartitionName=work Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
sleep 1
slurmctld -D >"$work/slurmctld.log" 2>&1 &
pids+=($!)
sleep 2
slurmd -D >"$work/slurmd.log" 2>&1 &
pids+=($!)
for _ in $(seq 30); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 1; done
sinfo

"$python" tests/hub.py >"$work/hub" 2>"$work/hub.log" &
pids+=($!)
for _ in $(seq 60); do [ -s "$work/hub" ] && break; sleep 1; done
export HF_ENDPOINT HEADBOUND_SWEEP=$work/sweep.yaml HEADBOUND_WAIT=0.05 PYTHONPATH=src:workflow
HF_ENDPOINT=$(head -n 1 "$work/hub")
cat >"$HEADBOUND_SWEEP" <<PLAN
name: slurm
whole: false
models: [EleutherAI/pythia-14m, EleutherAI/pythia-31m]
steps: [0, 1, 1000]
PLAN
snakemake=("$python" -m snakemake --snakefile workflow/sweep.smk)
HEADBOUND_CACHE=$work/local "${snakemake[@]}" --cores 2 2>"$work/local.log"
mkdir "$work/slurm"
HEADBOUND_CACHE=$work/slurm timeout 600 "${snakemake[@]}" --profile workflow/profiles/slurm --jobs 2 --retries 0 \
  --slurm-status-command squeue --slurm-no-account --slurm-logdir "$work/logs" \
  --slurm-init-seconds-before-status-checks 5 --default-resources slurm_partition=work 2>"$work/snakemake.log"
grep -c "has been submitted with SLURM jobid" "$work/snakemake.log" | sed 's/$/ jobs went through Slurm/'
diff -r "$work/local/sweeps" "$work/slurm/sweeps"
echo "$(find "$work/slurm/sweeps" -name 'step*.json' | wc -l) result files, equal to the local run's"
