{{- define "kvferry.selector" -}}
app.kubernetes.io/name: kvferry
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kvferry.labels" -}}
{{ include "kvferry.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{/* The daemon itself, the same in both modes. */}}
{{- define "kvferry.container" -}}
name: kvferry
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if eq .Values.mode "sidecar" }}
restartPolicy: Always
{{- end }}
env:
  - {name: KVFERRY_RUNTIME_DIR, value: /run/kvferry/daemon}
  - {name: KVFERRY_BUDGET_BYTES, value: {{ .Values.budgetBytes | quote }}}
  - {name: KVFERRY_PEER_HOST, value: 0.0.0.0}
  - {name: KVFERRY_PEER_PORT, value: {{ .Values.ports.peer | quote }}}
  - {name: KVFERRY_DATA_PORT, value: {{ .Values.ports.data | quote }}}
  - name: KVFERRY_ADVERTISE_HOST
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  - {name: KVFERRY_HTTP_PORT, value: {{ .Values.ports.metrics | quote }}}
  - name: KVFERRY_HTTP_HOST
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  {{- if .Values.keys.secretName }}
  - {name: KVFERRY_KEYS_DIR, value: /etc/kvferry/keys}
  {{- else if .Values.insecure }}
  - {name: KVFERRY_INSECURE, value: "true"}
  {{- else }}
  {{- fail "set keys.secretName, or insecure=true where everybody on the network is trusted" }}
  {{- end }}
  {{- if .Values.gpu.enabled }}
  - {name: KVFERRY_DEVICE, value: {{ .Values.gpu.device | quote }}}
  - {name: NVIDIA_VISIBLE_DEVICES, value: {{ .Values.gpu.visibleDevices | quote }}}
  {{- end }}
  {{- range $name, $value := .Values.config }}
  {{- /* a whole number comes as a float, and is not to be written as 1e+06 */}}
  {{- $text := ternary (printf "%.0f" (float64 $value)) (toString $value) (and (kindIs "float64" $value) (eq (floor $value) $value)) }}
  - {name: KVFERRY_{{ upper $name }}, value: {{ $text | quote }}}
  {{- end }}
ports:
  - {name: peer, containerPort: {{ .Values.ports.peer }}}
  - {name: data, containerPort: {{ .Values.ports.data }}}
  - {name: metrics, containerPort: {{ .Values.ports.metrics }}}
# No readiness probe: a daemon is ready when its first worker has come, and workers wait for it.
startupProbe: {httpGet: {path: /healthz, port: metrics}, periodSeconds: 1, failureThreshold: 30}
livenessProbe: {httpGet: {path: /healthz, port: metrics}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}
lifecycle:
  preStop: {exec: {command: [/opt/kvferry/bin/kvferry, drain, --wait-s, {{ .Values.drainS | quote }}]}}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: kvferry, mountPath: /run/kvferry}
  {{- if .Values.keys.secretName }}
  - {name: keys, mountPath: /etc/kvferry/keys, readOnly: true}
  {{- end }}
{{- end }}

{{/* What is the same of both modes' pods. */}}
{{- define "kvferry.pod" -}}
terminationGracePeriodSeconds: {{ add .Values.drainS (.Values.config.stop_s | default 30 | float64 | ceil) 15 }}
automountServiceAccountToken: false
securityContext:
  runAsUser: {{ .Values.uid | int64 }}
  runAsGroup: {{ .Values.uid | int64 }}
  fsGroup: {{ .Values.uid | int64 }}
  {{- with .Values.supplementalGroups }}
  supplementalGroups:
    {{- range . }}
    - {{ int64 . }}
    {{- end }}
  {{- end }}
  runAsNonRoot: true
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and .Values.gpu.enabled .Values.gpu.runtimeClassName }}
runtimeClassName: {{ .Values.gpu.runtimeClassName }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "kvferry.keys" -}}
{{- if .Values.keys.secretName }}
- name: keys
  secret: {secretName: {{ .Values.keys.secretName }}, defaultMode: 0440}
{{- end }}
{{- end }}
