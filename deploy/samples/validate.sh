#!/bin/sh
# Connects from every sleep pod to every address of the tcp-echo Services and pods and compares the greetings, then checks
# that the pods are enrolled, unless --plain is given. KUBECTL names another kubectl, as in KUBECTL="k3s kubectl".
set -eu

kubectl=${KUBECTL:-kubectl}
namespace=redirect-samples
# Services choose among their pods.
tries=4
failed=0

say() { printf '%s\n' "$*"; }

fail() {
    say "FAILED  $*"
    failed=1
}

# Word splitting is intended: the variable may contain arguments.
# shellcheck disable=SC2086
k() { $kubectl -n "$namespace" "$@"; }

k rollout status deployment --timeout=180s >/dev/null

# Prints a template for each pod that is not being deleted.
pods() {
    k get pods -l "$1" -o "go-template={{range .items}}{{if not .metadata.deletionTimestamp}}$2{{end}}{{end}}"
}

sleepers=$(pods app=sleep '{{.metadata.name}} ')

greets() {
    what=$1 address=$2 greeting=$3
    for sleeper in $sleepers; do
        # Expanded in the pod. A new Service may not be on every node yet, so this waits for its first answer.
        # shellcheck disable=SC2016
        heard=$(k exec "$sleeper" -- sh -c 'for i in $(seq 10); do [ -z "$(nc -w 5 "$1" 9000 </dev/null 2>/dev/null)" ] || break; sleep 1; done
            for i in $(seq "$2"); do nc -w 5 "$1" 9000 </dev/null 2>&1 || echo "nothing"; done | sort -u' \
            sh "$address" "$tries" </dev/null 2>&1) || true
        if [ "$heard" = "$greeting" ]; then
            say "ok      $sleeper -> $what $address: $heard"
        else
            fail "$sleeper -> $what $address: heard '$heard' instead of '$greeting'"
        fi
    done
}

# A Service, its greeting, its minimum number of families, and the families of its pods.
expect() {
    service=$1 greeting=$2 families=$3 wanted=$4
    addresses=$(k get service "$service" -o 'jsonpath={.spec.clusterIPs[*]}')
    count=0
    for address in $addresses; do
        count=$((count + 1))
        greets "$service" "$address" "$greeting"
    done
    [ "$count" -ge "$families" ] || fail "$service has $count addresses, not $families"
    [ -n "$wanted" ] || return 0
    for address in $(pods "app=$service" '{{range .status.podIPs}}{{.ip}} {{end}}'); do
        case $wanted:$address in
        any:* | ipv6:*:* | ipv4:*.*) greets "pod of $service" "$address" "$greeting" ;;
        esac
    done
}

expect tcp-echo-dual-stack "hello dualstack" 2 any
expect tcp-echo-preferred "hello dualstack" 1 ""
expect tcp-echo-ipv4 "hello ipv4" 1 ipv4
expect tcp-echo-ipv6 "hello ipv6" 1 ipv6

[ "${1:-}" != --plain ] || exit "$failed"
for pod in $(pods "" '{{.metadata.name}} '); do
    state=$(k get pod "$pod" -o 'jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}')
    if [ "$state" = enabled ]; then
        say "ok      $pod is enrolled"
    else
        fail "$pod: ambient.istio.io/redirection is '$state' instead of 'enabled'"
    fi
done
exit "$failed"
