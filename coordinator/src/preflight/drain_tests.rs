use flannel_migration_protocol::{Field, NodeView, State};

use super::*;
use crate::preflight::Severity;

fn workloads(yaml: &str) -> Workloads {
    let value: serde_json::Value = serde_saphyr::from_str(yaml).unwrap();
    let list = |name: &str| value.get(name).cloned().unwrap_or_else(|| serde_json::json!([]));
    let nodes: Vec<Node> = serde_json::from_value(list("nodes")).unwrap();
    let pods: Vec<Pod> = serde_json::from_value(list("pods")).unwrap();
    Workloads {
        nodes: nodes.into_iter().map(trimmed_node).collect(),
        pods: pods.into_iter().map(trimmed_pod).collect(),
        budgets: serde_json::from_value(list("budgets")).unwrap(),
    }
}

fn nodes(names: &[&str]) -> Vec<Arc<NodeFacts>> {
    let view = NodeView { state: Field::Present(State::Flannel), ..NodeView::default() };
    names
        .iter()
        .map(|name| NodeFacts { name: (*name).into(), view: view.clone(), ..NodeFacts::default() })
        .map(Arc::new)
        .collect()
}

fn reasons(yaml: &str, names: &[&str], strategy: Strategy) -> Vec<&'static str> {
    let mut findings = Vec::new();
    rules(&workloads(yaml), &nodes(names), strategy, &mut findings);
    findings.iter().map(|finding| finding.reason).collect()
}

/// A pod on node a; `spec` is more of its spec.
fn pod(spec: &str) -> String {
    format!(
        "{{metadata: {{name: web, namespace: shop, labels: {{app: web}}, ownerReferences: [{{kind: ReplicaSet, name: web, controller: true, apiVersion: v1, uid: x}}]}}, \
         spec: {{nodeName: a, containers: [{{name: c, resources: {{requests: {{cpu: 600m, memory: 1Gi}}}}}}], {spec}}}, \
         status: {{phase: Running, conditions: [{{type: Ready, status: 'True'}}]}}}}"
    )
}

const TWO: &str = "nodes: [{metadata: {name: a, labels: {disk: ssd}}, status: {allocatable: {cpu: '1', memory: 4Gi}}}, \
                   {metadata: {name: b, labels: {zone: west}}, status: {allocatable: {cpu: '1', memory: 4Gi}}}]\n";

#[test]
fn a_pod_that_another_node_takes_is_no_finding() {
    for spec in [
        "",
        "nodeSelector: {zone: west}",
        "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: disk, operator: DoesNotExist}]}]}}}",
    ] {
        let yaml = format!("{TWO}pods: [{}]", pod(spec));
        assert!(reasons(&yaml, &["a", "b"], Strategy::Drain).is_empty(), "{spec}");
    }
}

#[test]
fn a_pod_that_no_other_node_takes_is_told() {
    let tainted =
        TWO.replace("{zone: west}}", "{zone: west}}, spec: {taints: [{key: only, effect: NoSchedule}]}");
    let cordoned = TWO.replace("{zone: west}}", "{zone: west}}, spec: {unschedulable: true}");
    let full = TWO.replace("cpu: '1', memory: 4Gi}}}]", "cpu: 500m, memory: 4Gi}}}]");
    for (nodes, spec) in [
        (TWO, "nodeSelector: {disk: ssd}"),
        (
            TWO,
            "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchFields: [{key: metadata.name, operator: In, values: [a]}]}]}}}",
        ),
        (&tainted, ""),
        (&cordoned, ""),
        (&full, ""),
    ] {
        let yaml = format!("{nodes}pods: [{}]", pod(spec));
        assert_eq!(reasons(&yaml, &["a", "b"], Strategy::Drain), ["PodFitsNowhere"], "{nodes} {spec}");
        assert!(reasons(&yaml, &["a", "b"], Strategy::InPlace).is_empty());
    }
    let tolerant = format!("{tainted}pods: [{}]", pod("tolerations: [{key: only, operator: Exists}]"));
    assert!(reasons(&tolerant, &["a", "b"], Strategy::Drain).is_empty());
}

#[test]
fn a_budget_without_room_is_told_if_it_is_about_pods_that_must_leave() {
    let budget = |label: &str, allowed: i32| {
        format!(
            "{TWO}pods: [{}]\nbudgets: [{{metadata: {{name: web, namespace: shop}}, spec: {{selector: {{matchLabels: {{app: {label}}}}}}}, \
             status: {{disruptionsAllowed: {allowed}, currentHealthy: 1, desiredHealthy: 1, expectedPods: 1}}}}]",
            pod("")
        )
    };
    assert_eq!(reasons(&budget("web", 0), &["a", "b"], Strategy::Drain), ["BudgetForbidsEviction"]);
    assert!(reasons(&budget("web", 1), &["a", "b"], Strategy::Drain).is_empty());
    // The budget is kept without the one that isn't ready: the API server lets it go.
    let unready = budget("web", 0).replace("status: 'True'", "status: 'False'");
    assert!(reasons(&unready, &["a", "b"], Strategy::Drain).is_empty());
    let broken = unready.replace("currentHealthy: 1", "currentHealthy: 0");
    assert_eq!(reasons(&broken, &["a", "b"], Strategy::Drain), ["BudgetForbidsEviction"]);
    // One more healthy pod and it allows one: that is a matter of time.
    let starting = broken.replace("desiredHealthy: 1", "desiredHealthy: 0");
    let mut findings = Vec::new();
    for yaml in [&broken, &starting] {
        rules(&workloads(yaml), &nodes(&["a", "b"]), Strategy::Drain, &mut findings);
    }
    let weights: Vec<_> = findings.iter().map(|finding| (finding.reason, finding.severity)).collect();
    let expected = [Severity::HoldsNode, Severity::Warning].map(|weight| ("BudgetForbidsEviction", weight));
    assert_eq!(weights, expected);
    let pending = broken.replace("phase: Running", "phase: Pending");
    assert!(reasons(&pending, &["a", "b"], Strategy::Drain).is_empty());
    assert!(reasons(&budget("other", 0), &["a", "b"], Strategy::Drain).is_empty());
}

#[test]
fn a_single_node_is_told_for_a_drain() {
    assert_eq!(reasons("{}", &["a"], Strategy::Drain), ["SingleNode"]);
    assert!(reasons("{}", &["a"], Strategy::InPlace).is_empty());
}
