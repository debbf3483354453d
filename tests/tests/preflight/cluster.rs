//! Findings about rights, other controllers, budgets and pods; and those that only a run makes.

use std::time::Duration;

use flannel_migration_tests::{bed::flannel::documents, run};
use serde_json::json;

use super::world::{DRAIN, World, ours};

pub fn all(world: &mut World) {
    rights(world);
    others(world);
    draining(world);
    before_a_run(world);
}

fn rights(world: &mut World) {
    world.kubectl(&["delete", "clusterrolebinding", "flannel-migration-controller"]);
    let found = world.until(|found| found.len() > 10);
    for finding in &found {
        assert_eq!(finding.reason, "RightMissing", "{finding:?}");
        assert_eq!(finding.object, "service account kube-system/flannel-migration-controller");
    }
    let nodes = found.iter().find(|finding| finding.what.ends_with(" nodes")).unwrap();
    assert_eq!(nodes.what, "it may not get, list, patch, watch nodes");
    world.apply(&ours());
    world.expect_clear();
    world.kubectl(&["delete", "clusterrolebinding", "flannel-migration-preflight"]);
    world.kubectl(&["create", "clusterrole", "nodes-only", "--verb=list,watch", "--resource=nodes"]);
    world.kubectl(&["create", "clusterrolebinding", "nodes-only", "--clusterrole=nodes-only", &account()]);
    let found =
        world.until(|found| found.iter().any(|finding| finding.what == "it may not list daemonsets.apps"));
    assert!(found.iter().all(|finding| finding.reason == "RightMissing"), "{found:#?}");
    world.kubectl(&["delete", "clusterrolebinding/nodes-only", "clusterrole/nodes-only"]);
    world.apply(&ours());
    world.expect_clear();
}

fn account() -> String {
    "--serviceaccount=kube-system:flannel-migration-preflight".to_owned()
}

fn others(world: &mut World) {
    let stock = world.bed().parts.manifest("calico", "migration-job.yaml").unwrap();
    let job = documents(&stock).unwrap().into_iter().find(|object| object["kind"] == "Job").unwrap();
    world.create(&job);
    let found = world.expect(&[("AnotherController", "Job kube-system/flannel-migration")]);
    world.follow(&found[0].remedy);
    world.expect_clear();

    world.kubectl(&["-n", "kube-system", "delete", "daemonset", "flannel-migration-agent"]);
    let found = world.expect(&[("AgentsMissing", "DaemonSet kube-system/flannel-migration-agent")]);
    assert_eq!(found[0].severity, "warning");
    world.apply(&ours());
    world.expect_clear();
}

fn draining(world: &mut World) {
    let labels = json!({ "app": "guarded" });
    world.apply(&[
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "guarded", "namespace": "default" },
            "spec": { "replicas": 1, "strategy": { "type": "Recreate" }, "selector": { "matchLabels": labels }, "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "nodeSelector": { "kubernetes.io/hostname": "n1" },
                    "containers": [{ "name": "pause", "image": "pause" }],
                },
            } },
        }),
        json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "never", "namespace": "default" },
            "spec": { "minAvailable": 1, "selector": { "matchLabels": labels } },
        }),
    ]);
    // What a kubelet would say once it runs.
    let running =
        json!({ "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] } });
    run::wait_for("the pod is on its node", Duration::from_secs(20), || {
        let pods = world.bed().get(&["pods", "-l", "app=guarded", "--field-selector=spec.nodeName=n1"])?;
        let Some(name) = pods["items"][0]["metadata"]["name"].as_str() else { return Ok(false) };
        let patch = running.to_string();
        world.bed().kubectl(&[
            "patch",
            "pod",
            name,
            "--subresource=status",
            "--type=strategic",
            "-p",
            &patch,
        ])?;
        Ok(true)
    })
    .unwrap();
    let both = [
        ("BudgetForbidsEviction", "PodDisruptionBudget default/never"),
        ("PodFitsNowhere", "Pod default/guarded-"),
    ];
    let found = world.expect_with(DRAIN, &both);
    assert_eq!(found[0].severity, "holds-node");
    // In place, nothing of it is in the way.
    world.expect_clear();
    world.kubectl(&["delete", "poddisruptionbudget", "never"]);
    world.expect_with(DRAIN, &both[1..]);
    let patch = json!({ "spec": { "template": { "spec": { "nodeSelector": null } } } });
    world.kubectl(&["patch", "deployment", "guarded", "--type=merge", "-p", &patch.to_string()]);
    world.expect_with(DRAIN, &[]);
    world.kubectl(&["delete", "deployment", "guarded"]);
}

/// What a run says before it begins; exit status and text.
pub fn start(world: &mut World, environment: &[(&str, &str)]) -> (Option<i32>, String) {
    world.looks += 1;
    let mut all = vec![("PREFLIGHT_TIMEOUT", "1s")];
    all.extend(environment);
    let output = world.coordinator("controller", &all, &["run"]);
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn before_a_run(world: &mut World) {
    // Something that stops the run in any case: nothing may be written here.
    world.kubectl(&["-n", "kube-system", "delete", "daemonset", "flannel-migration-agent"]);
    let (status, text) = start(world, &[]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("AgentsMissing") && !text.contains("AdmissionRefuses"), "{text}");

    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
        "metadata": { "name": "no-labels" },
        "spec": {
            "matchConstraints": { "resourceRules": [{
                "apiGroups": [""], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["nodes"],
            }] },
            "validations": [{
                "expression": "request.userInfo.username != 'system:serviceaccount:kube-system:flannel-migration-controller'",
                "message": "labels are for others",
            }],
        },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": { "name": "no-labels" },
        "spec": { "policyName": "no-labels", "validationActions": ["Deny"] },
    });
    world.apply(&[policy, binding]);
    let mut text = String::new();
    let refused = |world: &mut World, text: &mut String| {
        *text = start(world, &[]).1;
        text.contains("AdmissionRefuses") && text.contains("labels are for others")
    };
    // A policy takes hold a moment after it is made.
    assert!((0..10).any(|_| refused(world, &mut text)), "{text}");
    world.produced.insert("AdmissionRefuses".to_owned());
    world.kubectl(&[
        "delete",
        "validatingadmissionpolicybinding/no-labels",
        "validatingadmissionpolicy/no-labels",
    ]);
    assert!((0..10).any(|_| !refused(world, &mut text)), "{text}");

    world.apply(&ours());
    world.expect_clear();
}
