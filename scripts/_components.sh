# shellcheck shell=bash
# Sourced by scripts/test and .ci/run: the real programs that tests start, and the packages of Debian that have them.

# One line each: what must be there, the Debian packages, the tests that need it.
COMPONENTS='chromium|chromium|the pages / and /docs in a browser
curl|curl|the commands of the documents
docker-registry|docker-registry|models in a registry
haproxy|haproxy|a rolling update behind a load balancer
nginx|nginx-light|a rolling restart behind nginx
openssl|openssl|TLS and encrypted keys
mmdebstrap|mmdebstrap|the container images
podman|podman|the container images
runc|runc|the container images
prometheus|prometheus|scraping, alert rules and autoscaling
promtool|prometheus|scraping, alert rules and autoscaling
wrk|wrk|the benchmarks
kustomize|kustomize|the Kubernetes manifests
cc|gcc libc6-dev|the C modules, and the wheel with its compiled hot path
g++|g++|models that PyTorch compiled
Python.h|python3-dev|the C modules, and the wheel with its compiled hot path
root|sudo|the container images'

# missing_components: print the lines of COMPONENTS that this machine does not have.
missing_components() {
  local name line
  while IFS= read -r line; do
    name="${line%%|*}"
    case "$name" in
      Python.h) [[ -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] || echo "$line" ;;
      root) [[ "$(id -u)" == 0 ]] || echo "$line" ;;
      kustomize) command -v kustomize >/dev/null || kubectl kustomize --help >/dev/null 2>&1 || echo "$line" ;;
      *) command -v "$name" >/dev/null || echo "$line" ;;
    esac
  done <<<"$COMPONENTS"
}
