{{- /* The name of everything: that of the release, which should be or contain "inferpool". */ -}}
{{- define "inferpool.name" -}}
{{- if contains "inferpool" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-inferpool" .Release.Name }}{{ end -}}
{{- end -}}

{{- /* The labels that select the pods of this release. */ -}}
{{- define "inferpool.selector" -}}
app.kubernetes.io/name: inferpool
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* A manifest of the base or of a component, named for the release: (list $ "base/service.yaml"). */ -}}
{{- define "inferpool.manifest" -}}
{{- $root := index . 0 -}}
{{- $path := printf "files/%s" (index . 1) -}}
{{- $manifest := required (printf "the chart has no %s" $path) ($root.Files.Get $path) | fromYaml -}}
{{- $labels := merge (dict "app.kubernetes.io/managed-by" $root.Release.Service
                           "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version))
                     (include "inferpool.selector" $root | fromYaml) -}}
{{- $_ := set $manifest "metadata" (merge (dict "name" (include "inferpool.name" $root)
                                                "namespace" $root.Release.Namespace
                                                "labels" $labels)
                                          $manifest.metadata) -}}
{{- toYaml $manifest -}}
{{- end -}}
