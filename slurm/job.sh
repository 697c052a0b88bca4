# shellcheck shell=bash disable=SC2016,SC2153,SC2154,SC2329
# One job: check the nodes, run the ranks, decide what comes next. This text is fixed; slurm/script.py
# writes the lines above it, which set its variables. The result of an attempt is read from the run folder,
# never from an exit code (a crash under --kill-on-bad-exit looks like a kill):
#   state      the attempt and its state, running | stopped | finished | failed, written by rank 0
#              (by all workers of a preparation, MODULE=slurm.prepare)
#   latest     the name of the newest checkpoint (of a preparation: how many slices are in DATA_DIR): if it has
#              changed, this attempt made progress
#   restarts   how often the run was restarted after crashes and bad nodes
#   stop       why no job continues this run; python -m slurm.resume removes the file
set -u

JOB=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || # a point of a sweep; SLURM_JOB_ID may be that of the whole array
    JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID RUN_DIR=$RUN_DIR/$SLURM_ARRAY_TASK_ID
CHILD='' STOPPING=0 TERMINATED=0
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

say() { printf '%(%F %T)T job %s: %s\n' -1 "$JOB" "$*"; }
field() { sed -n "s/.*\"$1\": *\"\{0,1\}\([a-z0-9]*\).*/\1/p" "$RUN_DIR/state" 2>/dev/null; }
latest() {
    [[ -n $DATA_DIR ]] || { cat "$RUN_DIR/latest" 2>/dev/null; return; }
    find "$DATA_DIR"/{survey,slices} -maxdepth 1 -name '[!.]*-*' 2>/dev/null | wc -l
}
patiently() { for _ in {1..60}; do "$@" && return; sleep 5; done; false; } # slurmctld may be down for a while
successors() { sed "0,/^$JOB\$/d" "$RUN_DIR/jobs"; } # the later jobs of a chain

leave() { # CODE: end this job, and cancel the later jobs of a chain
    if [[ $RESUME = chain ]]; then successors | xargs -r scancel; fi
    exit "$1"
}

give_up() { # REASON
    say "giving up: $1"
    printf '%s\n' "$1" >"$RUN_DIR/stop"
    leave 1
}

avoid_bad_nodes() { # JOB, which must not have started
    local nodes
    nodes=$(printf '%s\n' "$EXCLUDE" "$(cat "$RUN_DIR/excluded" 2>/dev/null)" | sed '/^$/d' | paste -sd,)
    [[ -z $nodes ]] || scontrol update "JobId=$1" "ExcNodeList=$nodes"
}

go_on() { # REASON
    local id
    say "$1; going on after what is saved ($(latest))"
    if [[ $RESUME = chain ]]; then
        for id in $(successors); do avoid_bad_nodes "$id"; done
        [[ -n $(successors) ]] || say "the chain has no more jobs; resume: python -m slurm.resume ${RUN_DIR@Q}"
        exit 0
    fi
    trap '' TERM # requeueing sends TERM, but bad nodes are still to be excluded
    patiently scontrol requeue "$JOB" || give_up "the job cannot be requeued; use slurm.resume=chain"
    avoid_bad_nodes "$JOB"
    exit 0
}

restart() { # REASON: at most MAX_RESTARTS times
    local before
    before=$(cat "$RUN_DIR/restarts" 2>/dev/null || echo 0)
    ((before < MAX_RESTARTS)) || give_up "$1, after $before restarts (slurm.max_restarts=$MAX_RESTARTS)"
    echo $((before + 1)) >"$RUN_DIR/restarts"
    go_on "$1 (restart $((before + 1)) of $MAX_RESTARTS)"
}

ask_to_stop() { # USR1: the time limit is near, or slurm.stop. USR2 is repeated: a rank may lack a handler
    STOPPING=1
    say "asking all ranks to save and stop"
    [[ -z $CHILD ]] || while kill -USR2 "$CHILD" 2>/dev/null; do sleep 5; done &
}
terminated() { # TERM: scancel, preemption, a failed node. SLURM itself requeues if necessary. KILL follows
    TERMINATED=1
    if [[ $RESUME = chain && $(scontrol -o show job "$JOB") != *PreemptTime=[0-9]* ]] &&
        ! sinfo -h -N -n "$SLURM_JOB_NODELIST" -o %T | grep -qE 'down|fail|[*]'; then
        echo "cancelled" >"$RUN_DIR/stop" # tells the next job of the chain not to start
    fi
}
trap ask_to_stop USR1
trap terminated TERM
trap '' USR2 # srun forwards it, but would be killed by it before it has installed its handler

still_ours() { # after a network partition the job may have been started again elsewhere
    local job
    job=$(patiently scontrol -o show job "$JOB" 2>/dev/null)
    [[ $job = *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $job = *" JobState=RUNNING "* ]]
}

run() { # COMMAND...: `wait` returns at every signal, so repeat it until the command has ended
    "$@" </dev/null &
    CHILD=$!
    ((!STOPPING)) || ask_to_stop
    while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD"; done
    CHILD=''
    ((!TERMINATED)) && still_ours && return
    say "ended by SLURM: cancelled, preempted or a failed node"
    exit 143
}

# Ignore USR2 and TERM until the rank has its handlers: srun forwards them from the first millisecond.
# A rank that sees a single GPU has it as number 0. The workers of a preparation go on without one that was killed;
# only a mistake of the user (2) ends them all.
RANK='trap "" USR2 TERM
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
[[ ${CUDA_VISIBLE_DEVICES:-,} = *,* ]] || LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
[[ $MODULE = slurm.prepare ]] || exec "$@"
"$@"
(($? != 2)) || exit 2'
on_ranks() { # STEP: of srun, ARGUMENTS...: of python. Consecutive ranks (an expert group) share a node
    # shellcheck disable=SC2086
    exec $1 --mpi=none --distribution=block:block "${SRUN[@]}" bash -c "$RANK" rank "${WRAP[@]}" "$PYTHON" "${@:2}"
}

check_nodes() { # reports bad nodes and restarts without them
    local report="$RUN_DIR/logs/health/$JOB.${SLURM_RESTART_COUNT:-0}" host found bad=()
    mkdir -p "$report"
    ((START_SECONDS == 0)) || # load the container image first: its load time says nothing about the node
        run on_ranks "timeout -k 10 $START_SECONDS srun -K0 -n ${#HOSTS[@]} --ntasks-per-node=1" -c "import torch"
    ((STOPPING)) || run on_ranks "timeout -k 10 $HEALTH_SECONDS srun --kill-on-bad-exit=0" \
        -m slurm.health "$report" "$((HEALTH_SECONDS / 3))" "${HEALTH[@]}"
    ((STOPPING)) && return
    for host in "${HOSTS[@]}"; do
        found=$(cat "$report/$host".* 2>/dev/null | sort -u | paste -sd' ')
        (($(find "$report" -name "$host.*" | wc -l) >= RANKS_PER_NODE)) || found+="no answer within $HEALTH_SECONDS s"
        [[ -z $found ]] || { say "health: $host: $found"; bad+=("$host"); }
    done
    ((${#bad[@]})) || { say "health: ${HOSTS[*]}: well"; return; }
    ((${#bad[@]} < ${#HOSTS[@]} || ${#HOSTS[@]} == 1)) || give_up "no node passes the health check, see above"
    printf '%s\n' "${bad[@]}" >>"$RUN_DIR/excluded"
    restart "health: bad nodes ${bad[*]}"
}

[[ ! -e $RUN_DIR/stop ]] || { say "not started: $(<"$RUN_DIR/stop")"; leave 0; }
[[ $(field state) != finished ]] || { say "the run is finished"; leave 0; }
cd "$CODE" || give_up "the code of the run is gone: $CODE"
for line in "${SETUP[@]}"; do eval "$line" || give_up "slurm.setup failed: $line"; done
export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 RANKS_PER_NODE MASTER_ADDR="${HOSTS[0]}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export MASTER_PORT=$((10000 + SLURM_JOB_ID * 2 % 20000))
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${SCRATCH:-${TMPDIR:-/tmp}}/triton-$JOB}" # not in a shared home
((HEALTH_SECONDS == 0)) || MASTER_PORT=$((MASTER_PORT + 1)) check_nodes

before=$(latest) attempt=$(field attempt)
export MODULE ATTEMPT=$((attempt + 1))
if ((!STOPPING)); then
    say "$([[ $MODULE = slurm.prepare ]] && echo preparing || echo training) on ${HOSTS[*]}"
    run on_ranks "srun --kill-on-bad-exit=1 --wait=0" -m "$MODULE" "$RUN_DIR"
fi
state=$(field state)
[[ $(field attempt) != "$attempt" ]] || state=unstarted
[[ $state != finished ]] || { say "finished"; leave 0; }
[[ ! -e $RUN_DIR/stop ]] || { say "stopped: $(<"$RUN_DIR/stop")"; leave 0; }
[[ $MODULE != slurm.prepare || $state != failed ]] || give_up "the preparation failed, see above"
if [[ $(latest) != "$before" ]]; then
    [[ $state = stopped ]] && go_on "saved and stopped"
    restart "the attempt ended '$state'"
fi
((!STOPPING)) || give_up "the time limit left no time for a step and its checkpoint; raise slurm.time"
[[ $state != stopped ]] || go_on "stopped by SLURM" # preempted before its first step
give_up "the attempt ended '$state' and saved nothing new; see $RUN_DIR/logs"
