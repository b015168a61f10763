{{- define "redirect.labels" -}}
{{ include "redirect.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "redirect.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "redirect.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "redirect.platform" -}}
{{ .Files.Get (printf "platforms/%s.yaml" (.Values.platform | default "default")) }}
{{- end }}

{{- /* What the agent may do. Kept here alone. */}}
{{- define "redirect.securityContext" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
capabilities:
  drop: [ALL]
  add:
    # Programs and maps.
    - BPF
    - PERFMON
    # Attaching them; rules and routes in pods.
    - NET_ADMIN
    # Notifications from the network namespaces of pods.
    - NET_BROADCAST
    # Entering those; the node's cgroup namespace, bpffs, sysctls.
    - SYS_ADMIN
    # Finding the namespaces of pods, and the cgroup of the node proxy.
    - SYS_PTRACE
seccompProfile:
  {{- toYaml .Values.seccompProfile | nindent 2 }}
{{- end }}

{{- /* Arguments about the CNI chain. */}}
{{- define "redirect.chainArguments" -}}
{{- $namespaces := append .Values.cni.excludeNamespaces .Release.Namespace | uniq -}}
- --cni-conf-dir=/host/cni/net.d
- --cni-bin-dir=/host/cni/bin
- --cni-agent-socket={{ .Values.runDirectory }}/agent.sock
- --cni-timeout={{ .Values.cni.timeout }}
- --cni-exclude-namespaces={{ join "," $namespaces }}
{{- with .Values.cni.confName }}
- --cni-conf-name={{ . }}
{{- end }}
{{- if .Values.cni.ownConf }}
- --cni-own-conf
{{- end }}
{{- end }}
