# Shared by the scripts of this folder: flags, the table of slices, and the one way to gcloud.
# shellcheck shell=bash
# shellcheck disable=SC2034    # the scripts use what is set here

set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "These scripts need bash 4.4 or newer. Received: $BASH_VERSION. On macOS: brew install bash." >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The flags that every script takes; a script sets the defaults of its own ones before it calls `parse`.
name='' zone='' project='' type='' dry_run=false
rest=()     # what follows --

usage() { printf '%s: %s (%s --help shows an example)\n' "${0##*/}" "$1" "$0" >&2; exit 2; }
fail() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit 1; }
note() { printf '%s\n' "$1" >&2; }

# explain: --help, which is the comment at the top of the script.
explain() { sed -n '2,/^[^#]/{/^# shellcheck/d;/^#/s/^# \{0,1\}//p}' "$0"; }

# parse FLAGS SWITCHES ARGUMENTS...: sets --flag=value and --switch; FLAGS and SWITCHES name the script's own ones.
parse() {
  local flags=" name zone project type $1 " switches=" dry_run $2 " key value
  shift 2
  while (($#)); do
    key=${1%%=*} key=${key#--}
    case $1 in
      --help | -h) explain; exit 0 ;;
      --) shift; rest=("$@"); break ;;
      --*=*) value=${1#*=} ;;
      --*)
        [[ $flags != *" $key "* ]] || usage "The value of a flag follows it after =. Received: $1. Write $1=VALUE."
        value=true ;;
      *) usage "Flags are written --flag=value. Received: $1." ;;
    esac
    [[ $flags$switches == *" $key "* ]] || usage "The flags are$flags${switches# }help. Received: --$key."
    [[ $flags == *" $key "* || $value =~ ^(true|false)$ ]] || usage "--$key is true or false. Received: $1."
    printf -v "$key" %s "$value"
    shift
  done
  where=("--zone=$zone" ${project:+"--project=$project"})
}

# need FLAG...: a usage error for each of them that has no value.
need() {
  local flag
  for flag; do [[ -n ${!flag} ]] || usage "--$flag is needed. Received: none."; done
}

# slice: what gcloud calls the slice of --type, its chips and hosts, and the runtime with TensorFlow 2.15.1 for it.
slice() {
  local size
  [[ $type =~ ^(v2|v3|v4|v5p|v5e|v5litepod|v6e)-([1-9][0-9]*)$ ]] ||
    usage "--type is a generation and a size: v2-8, v3-32, v4-8, v5e-32, v5p-8, v6e-64. Received: ${type:-none}."
  generation=${BASH_REMATCH[1]} size=${BASH_REMATCH[2]}
  case $generation in
    v2 | v3 | v4 | v5p)     # the size counts cores, two to a chip; a host has four chips
      ((size % 8 == 0)) || usage "The size of a $generation slice is a multiple of 8 cores. Received: $type."
      accelerator=$type chips=$((size / 2)) hosts=$((size / 8)) ;;
    *)                      # the size counts chips; up to eight of them share a host, of more each host has four
      [[ $size =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
        usage "A $generation slice has 1, 4, 8, 16, 32, 64, 128 or 256 chips. Received: $type."
      accelerator=${type/#v5e-/v5litepod-} chips=$size hosts=$((size <= 8 ? 1 : size / 4)) ;;
  esac
  image=tpu-vm-tf-2.15.1-pjrt
  ((hosts == 1)) || image=tpu-vm-tf-2.15.1-pod-pjrt
}

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run WORD...: shows a command and runs it; with --dry_run it is shown only.
run() {
  if [[ $dry_run == true ]]; then quoted "$@"; return; fi
  quoted "$@" >&2
  "$@" || fail "The command above must succeed. Received: exit code $?. Mend what it says, and start this script again."
}

# on WORKERS COMMAND: a command line on worker 0 or on all workers at once. --quiet: nobody may be there to be asked.
on() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet "--worker=$1" "--command=$2"; }

# look KIND SUPPOSED: sets `found` to the state of the tpu-vm or of its queued-resources entry; empty: there is none.
look() {
  local format='value(state)' errors
  [[ $1 == tpu-vm ]] || format='value(state.state)'
  local command=(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=$format")
  if [[ $dry_run == true ]]; then
    found=$2
    printf '%s    # suppose: %s\n' "$(quoted "${command[@]}")" "${found:-none there}"
    return
  fi
  errors=$(mktemp)
  if ! found=$("${command[@]}" 2>"$errors"); then
    found=''
    if ! grep -q NOT_FOUND "$errors"; then
      cat "$errors" >&2
      rm -f "$errors"
      note "${0##*/}: gcloud must be able to look at $name. Received: the above. Check --project, --zone, the login."
      return 1
    fi
  fi
  rm -f "$errors"
}
