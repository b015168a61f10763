#!/bin/sh
# Connects from the sleep pod to every address of the tcp-echo Services and compares the greetings, then looks whether
# the pods are enrolled. KUBECTL names another kubectl, as in KUBECTL="k3s kubectl".
set -eu

kubectl=${KUBECTL:-kubectl}
namespace=redirect-samples
failed=0

say() { printf '%s\n' "$*"; }

# Splits into words on purpose: the variable may hold arguments.
# shellcheck disable=SC2086
k() { $kubectl -n "$namespace" "$@"; }

k rollout status deployment --timeout=120s >/dev/null

expect() {
    service=$1 greeting=$2 families=$3
    addresses=$(k get service "$service" -o 'jsonpath={.spec.clusterIPs[*]}')
    count=0
    for address in $addresses; do
        count=$((count + 1))
        heard=$(k exec deployment/sleep -- nc -w 5 "$address" 9000 </dev/null 2>&1) || true
        if [ "$heard" = "$greeting" ]; then
            say "ok      $service $address: $heard"
        else
            say "FAILED  $service $address: heard '$heard' instead of '$greeting'"
            failed=1
        fi
    done
    if [ "$count" -lt "$families" ]; then
        say "FAILED  $service has $count addresses, not $families"
        failed=1
    fi
}

expect tcp-echo-dual-stack "hello from dual-stack" 2
expect tcp-echo-preferred "hello from dual-stack" 1
expect tcp-echo-ipv4 "hello from ipv4" 1
expect tcp-echo-ipv6 "hello from ipv6" 1

for pod in $(k get pods -o 'jsonpath={.items[*].metadata.name}'); do
    state=$(k get pod "$pod" -o 'jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}')
    if [ "$state" = enabled ]; then
        say "ok      $pod is enrolled"
    else
        say "FAILED  $pod is not enrolled: '$state'"
        failed=1
    fi
done
exit "$failed"
