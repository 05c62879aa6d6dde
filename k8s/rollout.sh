#!/bin/sh
# Rolls a version out over all pods of a Deployment: a canary in each one, and the label `stable` in all or in none.
#
#   k8s/rollout.sh MODEL FROM TO [SHARE] [REQUESTS]
#
# FROM answers now, and TO is in the models folder or store of all pods. SHARE of the requests of each pod is the
# canary's (5%); a pod decides after REQUESTS for each of the two versions (1000). If any pod rolls its canary back,
# FROM answers everywhere again, and the exit status is 1. The pods need an admin socket, INFERPOOL_ADMIN_SOCKET.
set -eu

model=$1 from=$2 to=$3 share=${4:-5%} requests=${5:-1000}
: "${NAMESPACE:=inferpool}" "${SELECTOR:=app.kubernetes.io/name=inferpool}" "${SOCKET:=/tmp/admin.sock}"
# By name, because a pod may have containers of a service mesh besides, and init containers.
: "${CONTAINER:=inferpool}"

pods=$(kubectl --namespace "$NAMESPACE" get pods --selector "$SELECTOR" --field-selector status.phase=Running \
  --output name)
[ -n "$pods" ] || { echo "no pod of $SELECTOR runs in $NAMESPACE" >&2; exit 1; }

in_pod() {
  target=$1
  shift
  kubectl --namespace "$NAMESPACE" exec "$target" --container "$CONTAINER" -- inferpool "$@" --url "unix:$SOCKET"
}

in_each_pod() {
  for pod in $pods; do
    echo "$pod: $*" >&2
    in_pod "$pod" "$@" || return 1
  done
}

back() {
  missed=
  for pod in $pods; do
    # The label also ends the canary.
    in_pod "$pod" labels "$model" "stable=$from" || missed="$missed $pod"
  done
  if [ -z "$missed" ]; then
    echo "$model: version $from answers again in all pods" >&2
  else
    # A pod that has gone meanwhile starts with the labels of model.toml.
    echo "$model: version $from answers again, but in these pods version $to may still answer:$missed" >&2
  fi
  exit 1
}
trap back HUP INT TERM

in_each_pod labels "$model" "stable=$from" || exit 1
in_each_pod load "$model" "$to" || back
in_each_pod traffic "$model" --canary "$to" --share "$share" --requests "$requests" || back
in_each_pod traffic "$model" --wait || back
echo "$model: version $to answers in all pods; write stable = $to into the model.toml, for pods that start later" >&2
